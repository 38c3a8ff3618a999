"""Images between layouts, registries and archives, as other tools see them."""

import asyncio
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.content.images.layout import LayoutImageStore
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import open_registry
from tests import oci_registry as registries
from tests.base_image import base_image
from tests.image_stores import AMD64, ARM64, manifest, of, put
from tests.oci_registry import OciRegistry
from tests.platform import BIN, run


def copy(source: str, target: str, *options: str, **env: str) -> str:
    """`ekiben images copy`; the digest that it prints."""
    command = [str(BIN / "ekiben"), "images", "copy", source, target, *options]
    return run(command, env={**os.environ, **env}, timeout_s=200).stdout.strip()


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")


@pytest.fixture(scope="module")
def base() -> str:
    return base_image()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciRegistry]:
    """A registry with TLS by a private authority, and logins."""
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    with registries.run_registry(tmp_path_factory.mktemp("registry"), login=True, tls=True) as registry:
        yield registry


def known(registry: OciRegistry, folder: Path) -> dict[str, str]:
    """What tells clients how to log in and whom to trust."""
    assert registry.certificates is not None
    certs = folder / "certs.d" / registry.host
    certs.mkdir(parents=True, exist_ok=True)
    shutil.copy(registry.certificates / "ca.pem", certs / "ca.crt")
    login = registry.write_docker_config(folder / "docker")
    return {"REGISTRY_AUTH_FILE": str(login), "EKIBEN_REGISTRY_CERTIFICATES": str(folder / "certs.d")}


def test_an_image_goes_to_a_registry_and_between_its_repositories_and_podman_and_skopeo_find_it(
    base: str, secured: OciRegistry, tmp_path: Path
) -> None:
    needs("skopeo", "podman")
    env = known(secured, tmp_path)
    here, there = secured.new_repository(), secured.new_repository()
    digest = copy(base, f"docker://{secured.host}/{here}:v1", **env)
    assert copy(f"docker://{secured.host}/{here}:v1", f"docker://{secured.host}/{there}", **env) == digest
    uploads = secured.folder / "docker/registry/v2/repositories" / there / "_uploads"
    assert not uploads.exists() or not list(uploads.iterdir()), "something was sent that was there"
    access = ["--cert-dir", f"{tmp_path}/certs.d/{secured.host}", "--authfile", env["REGISTRY_AUTH_FILE"]]
    shown = json.loads(
        run(["skopeo", "inspect", *access, f"docker://{secured.host}/{there}:v1"], env=os.environ).stdout
    )
    assert (shown["Digest"], shown["RepoTags"]) == (digest, ["v1"])
    folder = Path(tempfile.mkdtemp(prefix="ekp", dir="/tmp"))
    podman = ["podman", "--root", f"{folder}/r", "--runroot", f"{folder}/rr", "--runtime", "runc"]
    try:
        pulled = run(
            [*podman, "pull", "-q", *access, f"{secured.host}/{here}@{digest}"], env=os.environ, timeout_s=200
        ).stdout
        assert len(pulled.strip()) == 64
    finally:
        subprocess.run([*podman, "rmi", "--all", "--force"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_who_does_not_know_the_login_or_the_authority_is_told_what_to_do(
    base: str, secured: OciRegistry, tmp_path: Path
) -> None:
    env = known(secured, tmp_path)
    target = f"docker://{secured.host}/{secured.new_repository()}:v1"
    nobody = {**env, "REGISTRY_AUTH_FILE": str(tmp_path / "nothing.json")}
    with pytest.raises(AssertionError, match=r"wants a login for test/\w+.*docker login 127"):
        copy(base, target, **nobody)
    (tmp_path / "wrong.json").write_text(json.dumps({"auths": {secured.host: {"auth": "bWU6d3Jvbmc="}}}))
    with pytest.raises(AssertionError, match="wants a login"):
        copy(base, target, **{**env, "REGISTRY_AUTH_FILE": str(tmp_path / "wrong.json")})
    with pytest.raises(AssertionError, match="does not prove who it is"):
        copy(base, target, **{**env, "EKIBEN_REGISTRY_CERTIFICATES": str(tmp_path / "nothing")})
    with pytest.raises(AssertionError, match="no image"):
        copy(target, f"oci:{tmp_path}/layout", **env)
    assert not (tmp_path / "layout").exists()


def test_dockers_own_manifests_are_read_and_copied_as_they_are(
    base: str, oci_registry: OciRegistry, tmp_path: Path
) -> None:
    needs("skopeo")
    repository = oci_registry.new_repository()
    name = f"docker://{oci_registry.host}/{repository}:docker"
    options = ["--format", "v2s2", "--dest-tls-verify=false"]
    run(["skopeo", "copy", *options, base, name], env=os.environ, timeout_s=200)
    env = {"EKIBEN_REGISTRY_INSECURE": oci_registry.host}
    digest = copy(name, f"oci:{tmp_path}/layout:docker", **env)
    raw = run(["skopeo", "inspect", "--raw", "--tls-verify=false", name], env=os.environ).stdout
    assert json.loads(raw)["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert (tmp_path / "layout" / "blobs" / "sha256" / digest.partition(":")[2]).read_text() == raw

    async def layers() -> list[str]:
        options = RegistryOptions(insecure=frozenset({oci_registry.host}))
        async with open_registry(f"{oci_registry.host}/{repository}:docker", options) as (store, reference):
            _, image = await store.resolve(reference, AMD64)
            return [layer.media_type for layer in image.layers]

    assert asyncio.run(layers()) == ["application/vnd.oci.image.layer.v1.tar+gzip"]


def test_an_index_and_what_is_attached_come_along_and_one_platform_can_be_taken_out(
    oci_registry: OciRegistry, tmp_path: Path
) -> None:
    from services.content.images import EMPTY, INDEX, MANIFEST, Descriptor, canonical

    async def fill() -> list[Descriptor]:
        layout = LayoutImageStore(tmp_path / "from")
        entries = []
        for platform, content in ((AMD64, b"amd"), (ARM64, b"arm")):
            made, _ = await manifest(layout, of(content), platform)
            kept = await layout.keep(made, MANIFEST)
            entries.append(Descriptor(kept.media_type, kept.digest, kept.size_bytes, platform=platform))
            empty = Descriptor(EMPTY, *await layout.write(of(b"{}")))
            note = Descriptor("text/plain", *await layout.write(of(b"note on " + content)))
            subject = {"subject": kept.to_json(), "artifactType": "application/x-note"}
            about = {"schemaVersion": 2, "mediaType": MANIFEST, "config": empty.to_json(), "layers": [note.to_json()]}
            await layout.attach(canonical({**about, **subject}), MANIFEST)
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.to_json() for each in entries]}
        await layout.tag("both", canonical(index), INDEX, None)
        await put(layout, f"sha256-{entries[0].digest.hex}.sig", b"an old signature")
        return entries

    entries = asyncio.run(fill())
    env = {"EKIBEN_REGISTRY_INSECURE": oci_registry.host}
    name = f"docker://{oci_registry.host}/{oci_registry.new_repository()}"
    copy(f"oci:{tmp_path}/from:both", name, **env)
    only = copy(f"oci:{tmp_path}/from:both", f"{name}:arm", "--platform", "linux/arm64", **env)
    amd = copy(f"{name}:both", f"oci:{tmp_path}/amd:amd", "--platform", "linux/amd64", **env)
    assert [amd, only] == [str(each.digest) for each in entries]

    async def look() -> None:
        options = RegistryOptions(insecure=frozenset({oci_registry.host}))
        async with open_registry(name.removeprefix("docker://"), options) as (store, _):
            assert {"both", "arm"} <= set(await store.references())
            for entry in entries:
                assert [each.artifact_type for each in await store.referrers(entry.digest)] == ["application/x-note"]
        back = LayoutImageStore(tmp_path / "amd")
        assert await back.references() == ["amd", f"sha256-{entries[0].digest.hex}.sig"]
        assert len(await back.referrers(entries[0].digest)) == 1

    asyncio.run(look())


def test_an_archive_is_what_docker_and_podman_load(base: str, tmp_path: Path) -> None:
    needs("skopeo", "podman")
    file = tmp_path / "image.tar"
    file.write_text("what was there before")
    copy(base, f"docker-archive:{file}:team/base:v1")
    assert [each.name for each in tmp_path.iterdir()] == ["image.tar"]
    shown = json.loads(run(["skopeo", "inspect", f"docker-archive:{file}"], env=os.environ).stdout)
    assert shown["Os"] == "linux"
    with tarfile.open(file) as archive:
        names = archive.getnames()
        table = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert table[0]["RepoTags"] == ["team/base:v1"] and len(names) == len(set(names))
    run(["skopeo", "copy", f"oci-archive:{file}", f"oci:{tmp_path}/layout:v1"], env=os.environ)
    folder = Path(tempfile.mkdtemp(prefix="ekp", dir="/tmp"))
    podman = ["podman", "--root", f"{folder}/r", "--runroot", f"{folder}/rr", "--runtime", "runc"]
    try:
        assert "team/base:v1" in run([*podman, "load", "-i", str(file)], env=os.environ, timeout_s=200).stdout
    finally:
        subprocess.run([*podman, "rmi", "--all", "--force"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_an_archive_that_is_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_text("before")
    with pytest.raises(AssertionError, match="no image"):
        copy(f"oci:{tmp_path}/nothing:v1", f"docker-archive:{tmp_path}/image.tar")
    with pytest.raises(AssertionError, match="cannot be written"):
        copy(f"oci:{tmp_path}/nothing:v1", f"docker-archive:{tmp_path}/no/folder/image.tar")
    assert [each.name for each in tmp_path.iterdir()] == ["image.tar"]
    assert (tmp_path / "image.tar").read_text() == "before"
