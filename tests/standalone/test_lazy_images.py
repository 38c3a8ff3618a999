"""Layers that nodes pull lazily, read by those who do."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest

from services.builder.compression import Method, Packed
from services.builder.layers import Entry, tar
from services.builder.offline import here
from services.content.images import CONFIG, MANIFEST, Descriptor, canonical
from services.content.images.layout import LayoutImageStore
from tests.lazyread import MISSING, readers
from tests.oci_registry import OciRegistry
from tests.platform import run

LARGE = random.Random(7).randbytes((5 << 20) + 12345)
TEXT = b"".join(f"line {number}\n".encode() for number in range(100_000))
FILES = {
    "app/empty": b"",
    "app/large.bin": LARGE,
    "app/lib/" + "long-" * 40 + "name.py": b"print()\n",
    "app/lib/text.txt": TEXT,
    "app/näme": b"1",
    "app/zeros.bin": bytes(3 << 20),
}
ENTRIES = [
    *(Entry(name, data=data, owner=1034) for name, data in FILES.items()),
    Entry("app/link", link="lib/text.txt"),
    Entry("app/run.sh", data=b"#!/bin/sh\n", executable=True),
]


async def image(folder: Path, entries: Iterable[Entry], method: Method) -> Descriptor:
    """An image of one layer in the layout `folder`; the layer's descriptor."""
    store, packed = LayoutImageStore(folder), Packed(entries, method)

    async def given(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    digest, size_bytes = await store.write(given(packed))
    layer = Descriptor(packed.media_type, digest, size_bytes, packed.annotations)
    config = canonical(
        {
            "os": "linux",
            "architecture": here().architecture,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [str(packed.diff_id(digest))]},
            "history": [{"created_by": "test"}],
        }
    )
    config_digest, config_bytes = await store.write(given([config]))
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": Descriptor(CONFIG, config_digest, config_bytes).to_json(),
        "layers": [layer.to_json()],
    }
    await store.tag("v", canonical(manifest), MANIFEST, here())
    return layer


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the readers."""
    found = readers()
    if found is None:
        pytest.skip(MISSING)
    return found


async def test_every_file_of_estargz_is_found_and_verified_alone(tmp_path: Path, programs: Path) -> None:
    layer = await image(tmp_path / "layout", ENTRIES, Method.ESTARGZ)
    blob = tmp_path / "layout" / "blobs" / "sha256" / layer.digest.hex
    toc = layer.annotations["containerd.io/snapshot/stargz/toc.digest"]
    lines = run([str(programs / "estargz"), str(blob), toc], env=os.environ).stdout.splitlines()
    found = dict(line.lstrip("/").rsplit(" ", 1) for line in lines)
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert wanted.items() <= found.items()
    assert set(found) - set(wanted) == {".no.prefetch.landmark", "app/run.sh"}
    # Others take it for the gzip layer that it is.
    listed = run(["tar", "-tzf", str(blob)], env=os.environ | {"LC_ALL": "C.UTF-8"}).stdout.splitlines()
    assert listed[-1] == "stargz.index.json" and "app/link" in listed
    with pytest.raises(AssertionError, match="invalid TOC JSON"):
        run([str(programs / "estargz"), str(blob), f"sha256:{'0' * 64}"], env=os.environ)


async def test_podmans_library_fetches_each_file_of_zstd_chunked_and_knows_the_layer(
    tmp_path: Path, programs: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("a store of layers on overlay needs root")
    layer = await image(tmp_path / "layout", ENTRIES, Method.ZSTD_CHUNKED)
    blob = tmp_path / "layout" / "blobs" / "sha256" / layer.digest.hex
    with tempfile.TemporaryDirectory(prefix="ekc", dir="/tmp") as store:
        command = [str(programs / "zstdchunked"), str(blob), str(layer.digest), json.dumps(layer.annotations), store]
        # The store is the command's own, whatever this machine's or another test's says.
        (Path(store) / "storage.conf").write_text('[storage]\ndriver = "overlay"\n')
        env = os.environ | {"CONTAINERS_STORAGE_CONF": f"{store}/storage.conf"}
        unpacked, *lines = run(command, env=env).stdout.splitlines()
    # What it put together from headers and files is the tar.
    assert unpacked.removeprefix("sha256:") == hashlib.sha256(b"".join(tar(ENTRIES))).hexdigest()
    found = {tuple(line.split(" ", 1)[1].rsplit(" ", 1)): int(line.split()[0]) for line in lines}
    assert all(found[name, hashlib.sha256(data).hexdigest()] == 1034 for name, data in FILES.items())
    assert len(found) == len(FILES) + 1


@pytest.fixture
def podman(tmp_path: Path) -> Iterator[list[str]]:
    """podman with a store of its own that pulls files rather than layers."""
    for program in ("podman", "skopeo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")
    if os.getuid() != 0:
        pytest.skip("mounting an image without a container needs root")
    folder = Path(tempfile.mkdtemp(prefix="ekp", dir="/tmp"))
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/r"\nrunroot = "{folder}/rr"\n'
        '[storage.options]\npull_options = {enable_partial_images = "true", use_hard_links = "false"}\n'
    )
    env = os.environ | {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf")}
    yield ["env", f"CONTAINERS_STORAGE_CONF={folder}/storage.conf", "podman", "--runtime", "runc"]
    subprocess.run(["podman", "image", "umount", "--all", "--force"], env=env, capture_output=True)
    subprocess.run(["podman", "rmi", "--all", "--force"], env=env, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


async def test_podman_pulls_the_files_it_has_not(podman: list[str], oci_registry: OciRegistry, tmp_path: Path) -> None:
    repository = f"{oci_registry.host}/{oci_registry.new_repository('lazy')}"
    changed = [Entry("app/näme", data=b"2") if each.name == "app/näme" else each for each in ENTRIES]
    for version, entries in (("1", ENTRIES), ("2", changed)):
        await image(tmp_path / version, entries, Method.ESTARGZ)
        copy = ["skopeo", "copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{tmp_path}/{version}:v"]
        run([*copy, f"docker://{repository}:{version}"], env=os.environ)
        pull = [*podman, "--log-level", "debug", "pull", "--tls-verify=false", f"{repository}:{version}"]
        told = run(pull, env=os.environ).stderr
        assert "etrieved partial blob" in told, [each for each in told.splitlines() if "artial" in each]
    for version, entries in (("1", ENTRIES), ("2", changed)):
        mounted = Path(run([*podman, "image", "mount", f"{repository}:{version}"], env=os.environ).stdout.strip())
        # Owners are not looked at: podman 4.3 gives root what it fetches so, of its own images too.
        for entry in entries:
            if entry.data is not None:
                assert (mounted / entry.name).read_bytes() == entry.data, entry.name
        assert (mounted / "app/link").readlink() == Path("lib/text.txt")
        assert os.access(mounted / "app/run.sh", os.X_OK)


async def test_who_pulls_whole_layers_sees_no_difference(podman: list[str], tmp_path: Path) -> None:
    for method in (Method.ZSTD, Method.ZSTD_CHUNKED, Method.GZIP):
        await image(tmp_path / method.name.lower(), ENTRIES, method)
        name = run(
            [*podman, "pull", "--quiet", f"oci:{tmp_path}/{method.name.lower()}:v"], env=os.environ
        ).stdout.strip()
        mounted = Path(run([*podman, "image", "mount", name], env=os.environ).stdout.strip())
        for entry in ENTRIES:
            if entry.data is not None:
                assert (mounted / entry.name).read_bytes() == entry.data, entry.name
                assert (mounted / entry.name).stat().st_uid == entry.owner
        run([*podman, "image", "umount", name], env=os.environ)
        run([*podman, "rmi", "--force", name], env=os.environ)
