"""A base image of a few hundred bytes: what is looked for in one is there, and none of it runs."""

import asyncio
import gzip
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

from services.builder.platforms import here
from services.content.images import CONFIG, LAYER_GZIP, MANIFEST, Descriptor, Platform, canonical
from services.content.images.layout import LayoutImageStore


def small_base(folder: Path, *, python: str = "3.11", marker: str = "", platform: Platform | None = None) -> str:
    """Write it into a layout; gives its name. Another `marker` makes another image, another platform one beside it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in (
            ("bin/bash", "#!"),
            (f"usr/local/bin/python{python}", "#!"),
            ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n"),
            ("etc/group", "root:x:0:\n"),
            ("etc/marker", marker),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(text), 0o755 if "/bin/" in f"/{name}" else 0o644
            archive.addfile(member, io.BytesIO(text.encode()))
    plain = out.getvalue()
    packed = gzip.compress(plain, mtime=0)
    asyncio.run(_write(LayoutImageStore(folder), packed, hashlib.sha256(plain).hexdigest(), python, platform or here()))
    return f"oci:{folder}:{python}"


async def _write(store: LayoutImageStore, packed: bytes, diff_id: str, reference: str, platform: Platform) -> None:
    layer = Descriptor(LAYER_GZIP, *await store.write(_one(packed)))
    config = {
        "architecture": platform.architecture,
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
        "history": [{"created_by": "a test"}],
    }
    named = Descriptor(CONFIG, *await store.write(_one(canonical(config))))
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": named.to_json(), "layers": [layer.to_json()]}
    await store.tag(reference, canonical(manifest), MANIFEST, platform)


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content
