"""A base image for tests, as an OCI layout: Debian's Python in a minimal Debian, made by debootstrap, kept between runs."""

import asyncio
import contextlib
import fcntl
import gzip
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.builder.offline import here
from services.content.images import CONFIG, LAYER_GZIP, MANIFEST, Descriptor, Platform, canonical
from services.content.images.layout import LayoutImageStore
from tests.bentoml_clients import cache_dir

_PACKAGES = "python3,ca-certificates,libgomp1"
_LEFT_OUT = (
    "var/cache",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "dev",
    "proc",
    "sys",
)


def base_image() -> str:
    """`oci:FOLDER` of the base; skipped where debootstrap or root's rights are missing."""
    folder = cache_dir() / "base-bookworm"
    with open(cache_dir() / "base-bookworm.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.json").exists():
            if shutil.which("debootstrap") is None or os.getuid() != 0:
                pytest.skip("the base image is made by debootstrap, as root (Debian: apt-get install debootstrap)")
            _make(folder)
    return f"oci:{folder}"


def foreign_base_image() -> tuple[str, str]:
    """`oci:FOLDER` of the same base for linux/arm64, and the emulator that runs its programs; skipped without one."""
    emulator = shutil.which("qemu-aarch64-static")
    if here().architecture != "amd64" or emulator is None:
        pytest.skip("arm64 is emulated on amd64, by qemu (Debian: apt-get install qemu-user-static)")
    folder = cache_dir() / "base-bookworm-arm64"
    with open(cache_dir() / "base-bookworm-arm64.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.json").exists():
            if shutil.which("debootstrap") is None or os.getuid() != 0:
                pytest.skip("the base image is made by debootstrap, as root (Debian: apt-get install debootstrap)")
            with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
                rootfs = Path(work) / "rootfs"
                command = ["debootstrap", "--foreign", "--arch=arm64", "--variant=minbase", f"--include={_PACKAGES}"]
                subprocess.run([*command, "bookworm", str(rootfs)], check=True, capture_output=True, timeout=900)
                # Nothing of another architecture is run: packages are unpacked, and none is configured.
                for package in sorted((rootfs / "var/cache/apt/archives").glob("*.deb")):
                    subprocess.run(["dpkg", "-x", str(package), str(rootfs)], check=True, timeout=120)
                from_rootfs(rootfs, Path(work) / "layout", Platform("linux", "arm64"))
                (Path(work) / "layout").rename(folder)
    return f"oci:{folder}", emulator


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
        rootfs = Path(work) / "rootfs"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(rootfs)],
            check=True,
            capture_output=True,
            timeout=900,
        )
        from_rootfs(rootfs, Path(work) / "layout")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        (Path(work) / "layout").rename(folder)


def from_rootfs(rootfs: Path, layout: Path, platform: Platform | None = None) -> None:
    """The layout of an image with one layer that holds `rootfs`; for this machine where no platform is named."""
    platform = platform or here()

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = member.name.removeprefix("./")
        inside = any(name.startswith(f"{each}/") for each in _LEFT_OUT)
        return None if inside or name.endswith(".deb") else member

    packed, plain = layout.with_suffix(".tar.gz"), layout.with_suffix(".tar")
    with tarfile.open(plain, "w") as archive:
        archive.add(rootfs, ".", filter=kept)
    with open(plain, "rb") as source, gzip.GzipFile(packed, "wb", 1, mtime=0) as target:
        shutil.copyfileobj(source, target, 1 << 20)

    async def write() -> None:
        store = LayoutImageStore(layout)
        digest, size = await store.write(_file(packed))
        diff_id, _ = await store.write(_file(plain))
        (layout / "blobs" / "sha256" / diff_id.hex).unlink()
        config = {
            "os": "linux",
            "architecture": platform.architecture,
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["bash"]},
            "rootfs": {"type": "layers", "diff_ids": [str(diff_id)]},
        }
        config_digest, config_size = await store.write(_bytes(canonical(config)))
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": Descriptor(CONFIG, config_digest, config_size).to_json(),
            "layers": [Descriptor(LAYER_GZIP, digest, size).to_json()],
        }
        await store.tag("bookworm", json.dumps(manifest).encode(), MANIFEST, platform)

    asyncio.run(write())


async def _file(path: Path) -> AsyncIterator[bytes]:
    with open(path, "rb") as file:  # noqa: ASYNC230 - nothing else runs in this loop
        while chunk := file.read(1 << 20):
            yield chunk


async def _bytes(content: bytes) -> AsyncIterator[bytes]:
    yield content
