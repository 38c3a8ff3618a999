"""What other tools make of signatures and attestations, and what Ekiben makes of theirs, in a real registry."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.builder.image_signing import here
from services.content.attestations import attachments, envelopes
from services.content.images import Descriptor
from services.content.images.layout import LayoutImageStore
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import open_registry
from tests.bentoml_clients import cache_dir
from tests.image_content import put_image
from tests.oci_registry import OciRegistry
from tests.platform import BIN

_QUIET = {"COSIGN_PASSWORD": "secret", "TUF_ROOT": "/nonexistent"}


def program(name: str) -> str:
    """A tool on the path, or in `bin` of the tests' cache."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:{cache_dir() / 'bin'}")
    if found is None:
        pytest.skip(f"{name} is not installed (Debian 13: apt-get install {name})")
    return found


@dataclass(frozen=True)
class Place:
    """A signed image in a registry, and the keys."""

    image: str
    digest: str
    folder: Path
    env: Mapping[str, str]

    def referrers(self, registry: OciRegistry) -> Path:
        """The tag that lists what is attached, as the registry keeps it."""
        repository = self.image.partition("/")[2].rpartition(":")[0]
        tags = registry.folder / "docker/registry/v2/repositories" / repository / "_manifests/tags"
        return tags / self.digest.replace(":", "-")

    def ekiben(self, *arguments: object, status: int = 0) -> str:
        done = subprocess.run(
            [str(BIN / "ekiben"), "images", *map(str, arguments)],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stderr
        return done.stdout.strip() if status == 0 else done.stderr

    def cosign(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [program("cosign"), *arguments], env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode == 0) is (status == 0), done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def place(oci_registry: OciRegistry, tmp_path: Path) -> Place:
    """An image in a repository of its own, with a bill of material and provenance that nobody signed."""
    repository = oci_registry.new_repository()
    options = RegistryOptions(insecure=frozenset({oci_registry.host}))

    async def put() -> Descriptor:
        made = await put_image(tmp_path / "layout", "v")
        layout = LayoutImageStore(tmp_path / "layout")
        async with open_registry(f"{oci_registry.host}/{repository}:v", options) as (store, reference):
            _, content = await layout.resolve("v", here())
            manifest = await attachments.read(layout, made)
            for blob in (Descriptor.from_json(json.loads(manifest)["config"]), *content.layers):
                await store.write(layout.read(blob), blob)
            await attachments.attach(store, made, envelopes.CYCLONEDX, b'{"bomFormat":"CycloneDX","specVersion":"1.6"}')
            await attachments.attach_statement(store, made, envelopes.PROVENANCE, {"buildDefinition": {}})
            return await store.tag(reference, manifest, made.media_type, here())

    descriptor = asyncio.run(put())
    (tmp_path / "password").write_text("secret")
    env = {**os.environ, **_QUIET, "EKIBEN_REGISTRY_INSECURE": oci_registry.host, "HOME": str(tmp_path)}
    return Place(f"{oci_registry.host}/{repository}:v", str(descriptor.digest), tmp_path, env)


@pytest.mark.parametrize("older", [False, True])
def test_cosign_verifies_what_ekiben_signed(place: Place, oci_registry: OciRegistry, older: bool) -> None:
    program("cosign")
    place.ekiben("keygen", "our.key", "--password-file", "password")
    place.ekiben("keygen", "other.key", "--no-password")
    options = ["--older-clients"] if older else []
    place.ekiben("sign", f"docker://{place.image}", "--key", "our.key", "--password-file", "password", *options)
    if older:
        shutil.rmtree(place.referrers(oci_registry))  # the tag alone is left: what clients before cosign 3 read
        assert place.ekiben("verify", f"docker://{place.image}", "--key", "our.pub") == place.digest
    unlogged = ["--insecure-ignore-tlog=true", "--allow-http-registry"]
    assert place.digest in place.cosign("verify", "--key", "our.pub", *unlogged, place.image)
    place.cosign("verify", "--key", "other.pub", *unlogged, place.image, status=1)


def test_ekiben_verifies_what_cosign_signed_and_signs_with_its_key(place: Place) -> None:
    place.cosign("generate-key-pair")
    at_digest = f"{place.image.rpartition(':')[0]}@{place.digest}"
    offline = ["--use-signing-config=false", "--tlog-upload=false", "--allow-http-registry", "-y"]
    assert "has no signature" in place.ekiben("verify", f"docker://{place.image}", "--key", "cosign.pub", status=1)
    place.cosign("sign", "--key", "cosign.key", *offline, at_digest)
    assert place.ekiben("verify", f"docker://{place.image}", "--key", "cosign.pub", "--whole") == place.digest
    (place.folder / "predicate.json").write_text('{"bomFormat": "CycloneDX"}')
    attest = ["attest", "--type", "cyclonedx", "--predicate", "predicate.json", "--key", "cosign.key"]
    place.cosign(*attest, *offline, at_digest)
    said = place.ekiben("sbom", f"docker://{place.image}", "--key", "cosign.pub")
    assert json.loads(said) == {"bomFormat": "CycloneDX"}
    place.ekiben("sign", f"docker://{place.image}", "--key", "cosign.key", "--password-file", "password")


def test_oras_lists_what_is_attached_and_copies_it(place: Place, oci_registry: OciRegistry) -> None:
    oras = program("oras")
    place.ekiben("keygen", "our.key", "--no-password")
    place.ekiben("sign", f"docker://{place.image}", "--key", "our.key")

    def call(*arguments: str) -> str:
        done = subprocess.run([oras, *arguments], env=place.env, cwd=place.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = call("discover", "--plain-http", place.image)
    for kind in (envelopes.BUNDLE, envelopes.CYCLONEDX, envelopes.IN_TOTO):
        assert kind in shown
    # Out of a registry into a layout and into another repository: what is attached goes with it, and still counts.
    call("cp", "-r", "--from-plain-http", "--to-oci-layout", place.image, "copy:v")
    other = f"{oci_registry.host}/{oci_registry.new_repository()}:v"
    call("cp", "-r", "--from-oci-layout", "--to-plain-http", "copy:v", other)
    for image in ("oci:copy:v", f"docker://{other}"):
        assert place.ekiben("verify", image, "--key", "our.pub") == place.digest
        assert json.loads(place.ekiben("sbom", image))["bomFormat"] == "CycloneDX"


def test_a_signature_that_was_removed_from_the_registry_is_missed(place: Place, oci_registry: OciRegistry) -> None:
    place.ekiben("keygen", "our.key", "--no-password")
    place.ekiben("sign", f"docker://{place.image}", "--key", "our.key")
    shutil.rmtree(place.referrers(oci_registry))
    assert "has no signature" in place.ekiben("verify", f"docker://{place.image}", "--key", "our.pub", status=1)
