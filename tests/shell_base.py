"""A base image of some MiB in which commands run: a shell and a few programs of this machine, with their libraries."""

import asyncio
import gzip
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.builder.engine import write_image
from services.builder.platforms import here
from services.content.images import LAYER_GZIP, Descriptor, Image
from services.content.images.layout import LayoutImageStore

PROGRAMS = ("sh", "bash", "cat", "chmod", "dd", "ln", "ls", "mkdir", "rm", "sleep", "touch")


def shell_base(folder: Path) -> tuple[LayoutImageStore, Image]:
    """Write its layer into a layout; gives that and the image. Skipped where programs and engine are missing."""
    for program in (*PROGRAMS, "ldd", "buildah"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    files: dict[str, Path] = {}
    for program in PROGRAMS:
        path = Path(str(shutil.which(program))).resolve()
        files[f"bin/{program}"] = path
        shown = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
        files |= {library.lstrip("/"): Path(library).resolve() for library in re.findall(r"(/\S+) \(0x", shown)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in {
            "etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
            "etc/group": b"root:x:0:\n",
            "etc/old": b"old\n",
            "usr/local/bin/python3.11": b"#!/bin/sh\n",  # to be found, not to be run
        }.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755 if "/bin/" in name else 0o644
            archive.addfile(member, io.BytesIO(content))
        for folder_name in ("tmp", "opt", "proc", "dev", "sys"):
            member = tarfile.TarInfo(folder_name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        for name, path in sorted(files.items()):
            member = archive.gettarinfo(path, name)
            member.type, member.mode, member.linkname = tarfile.REGTYPE, 0o755, ""
            member.size, member.uid, member.gid, member.mtime = path.stat().st_size, 0, 0, 0
            with path.open("rb") as file:
                archive.addfile(member, file)
    plain = out.getvalue()
    store = LayoutImageStore(folder)
    digest, size_bytes = asyncio.run(store.write(_one(gzip.compress(plain, 1, mtime=0))))
    config = {
        "architecture": here().architecture,
        "os": "linux",
        "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(plain).hexdigest()}"]},
    }
    return store, Image(config, [Descriptor(LAYER_GZIP, digest, size_bytes)])


def named_shell_base(folder: Path) -> str:
    """The same as an image with a name, in which a Python 3.11 is found."""
    store, image = shell_base(folder)
    asyncio.run(write_image(image, store, store, "3.11"))
    return f"oci:{folder}:3.11"


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content
