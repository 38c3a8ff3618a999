"""What is found in the layers of a base image, whatever they are packed with."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.builder.bases import Python, look_into
from services.builder.compression import Method, Packed
from services.builder.layers import Entry
from services.content.images import LAYER_ZSTD, Descriptor, Image
from services.content.images.layout import LayoutImageStore

# The data in front makes it more than one frame.
ENTRIES = [
    Entry("bin/bash", data=b"#!", executable=True),
    Entry("a/large", data=hashlib.sha256(b"1").digest() * 100_000),
    Entry("etc/passwd", data=b"root:x:0:0::/:/bin/sh\n"),
    Entry("usr/local/bin/python3.12", data=b"", executable=True),
]


async def stored(store: LayoutImageStore, chunks: list[bytes], media_type: str) -> Descriptor:
    async def given() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    digest, size_bytes = await store.write(given())
    return Descriptor(media_type, digest, size_bytes)


@pytest.mark.parametrize("method", list(Method))
async def test_layers_of_a_base_are_read_however_they_are_packed(method: Method, tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")
    layer = await stored(store, list(Packed(ENTRIES, method)), method.media_type)
    base = await look_into(Image({}, [layer]), store, tmp_path / "remembered")
    assert base.python("3.12.1", "base") == Python("/usr/local/bin/python3.12", "3.12")
    assert base.files == {"etc/passwd": "root:x:0:0::/:/bin/sh\n"}


async def test_a_layer_that_is_cut_or_no_tar_is_refused_in_words(tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")
    whole = b"".join(Packed(ENTRIES, Method.ZSTD))
    for number, data in enumerate((whole[: len(whole) // 2], b"no tar at all, but long enough to be one" * 100)):
        layer = await stored(store, [data], LAYER_ZSTD)
        with pytest.raises(FailedPrecondition, match="not readable"):
            await look_into(Image({}, [layer]), store, tmp_path / f"remembered-{number}")


async def test_the_distributions_packages_are_found_and_those_that_a_layer_above_removed_are_not(
    tmp_path: Path,
) -> None:
    store = LayoutImageStore(tmp_path / "layout")
    dpkg = "Package: {}\nStatus: {} ok {}\nArchitecture: amd64\nVersion: {}\n"
    lower = [("libc6", "install", "installed", "2.36-9+deb12u1"), ("gone", "install", "installed", "1")]
    upper = [lower[0], ("gone", "deinstall", "config-files", "1"), ("curl", "install", "installed", "7:1.0")]
    release = b'PRETTY_NAME="Debian"\nID=debian\nVERSION_ID="12"\n'
    layers = [
        await stored(store, list(Packed(entries, Method.GZIP)), Method.GZIP.media_type)
        for entries in (
            [Entry("usr/lib/os-release", data=release), Entry("var/lib/dpkg/status", data=listed(dpkg, lower))],
            [Entry("var/lib/dpkg/status", data=listed(dpkg, upper))],
        )
    ]
    base = await look_into(Image({}, layers), store, tmp_path / "remembered")
    assert base.packages == (
        "pkg:deb/debian/curl@7:1.0?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64&distro=debian-12",
    )
    assert await look_into(Image({}, layers), store, tmp_path / "remembered") == base
    apk = b"C:Q1\nP:musl\nV:1.2.4-r2\nA:x86_64\n\nP:zlib\nV:1.3-r1\nA:x86_64\n"
    alpine = [Entry("lib/apk/db/installed", data=apk), Entry("etc/os-release", data=b"ID=alpine\nVERSION_ID=3.19.1\n")]
    layer = await stored(store, list(Packed(alpine, Method.GZIP)), Method.GZIP.media_type)
    base = await look_into(Image({}, [layer]), store, tmp_path / "remembered")
    assert base.packages[0] == "pkg:apk/alpine/musl@1.2.4-r2?arch=x86_64&distro=alpine-3.19.1"


def listed(form: str, packages: list[tuple[str, str, str, str]]) -> bytes:
    return "\n".join(form.format(*each) for each in packages).encode()
