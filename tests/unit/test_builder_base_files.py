"""What a base image's layers say about its Pythons, its C library and its users."""

import gzip
import io
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zstandard

from ekiben.errors import FailedPrecondition
from services.builder.base_files import BaseFiles, members, opened, spooled
from services.builder.bases import Base
from services.builder.failures import parse
from services.builder.targets import Target
from services.content.images import LAYER, Descriptor, Platform
from services.content.images.layout import LayoutImageStore

HOME = "/root"
"""Of root, in an image."""

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


def layer(*members: tuple[str, bytes | str | int]) -> io.BytesIO:
    """A tar: bytes are a file (executable), text is where a link leads, a number is a folder's mode."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size, info.mode = len(content), 0o755
                archive.addfile(info, io.BytesIO(content))
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.type, info.mode = tarfile.DIRTYPE, content
                archive.addfile(info)
    buffer.seek(0)
    return buffer


def read(*layers: io.BytesIO) -> BaseFiles:
    files = BaseFiles()
    for each in layers:
        files.add(each)
    return files


def test_the_versions_of_pythons_come_from_whatever_tells_them() -> None:
    dpkg = b"Package: python3.11-minimal\nStatus: ok\nVersion: 3.11.2-6+deb12u4\n\nPackage: bash\nVersion: 5.2\n"
    files = read(
        layer(
            ("./usr/bin/python3.11", b""),
            ("var/lib/dpkg/status", dpkg),
            ("usr/local/bin/python3.12", b""),
            ("usr/local/include/python3.12/patchlevel.h", b'#define PY_VERSION "3.12.4"\n'),
            ("usr/local/bin/python3.10", b""),
            ("opt/conda/bin/python3.9", b""),
            ("opt/conda/conda-meta/python-3.9.19-h955ad1f_1.json", b"{}"),
            ("opt/uv/cpython-3.13.1-linux-x86_64-gnu/bin/python3.13", b""),
            ("usr/local/bin/python3.13", "/opt/uv/cpython-3.13.1-linux-x86_64-gnu/bin/python3.13"),
            ("opt/own/bin/python3.8", b""),
        )
    )
    assert files.pythons({"PYTHON_VERSION": "3.10.14"}) == {
        "/usr/bin/python3.11": "3.11.2",
        "/usr/local/bin/python3.12": "3.12.4",
        "/usr/local/bin/python3.10": "3.10.14",
        "/opt/conda/bin/python3.9": "3.9.19",
        "/opt/uv/cpython-3.13.1-linux-x86_64-gnu/bin/python3.13": "3.13.1",
        "/usr/local/bin/python3.13": "3.13.1",
        "/opt/own/bin/python3.8": "3.8",
    }
    apk = b"C:Q1\nP:python3\nV:3.12.9-r0\nA:x86_64\n\nP:musl\nV:1.2.5-r9\n"
    alpine = read(layer(("lib/apk/db/installed", apk), ("usr/bin/python3.12", b""), ("lib/ld-musl-x86_64.so.1", b"")))
    assert (alpine.pythons({}), alpine.libc) == ({"/usr/bin/python3.12": "3.12.9"}, "musl")


def test_pythons_that_nobody_but_root_can_run_or_that_are_gone_do_not_count() -> None:
    lower = layer(
        ("root", 0o700),
        ("root/.local/bin/python3.12", b""),
        ("usr/local/bin/python3.12", f"{HOME}/.local/bin/python3.12"),
        ("usr/bin/python3.9", b""),
        ("opt/a/bin/python3.10", b""),
        ("opt/venv/pyvenv.cfg", b"home = /usr/bin"),
        ("opt/venv/bin/python3.11", "/usr/bin/python3.11"),
        ("bin", "usr/bin"),
        ("usr/bin/python3.11", b""),
        ("usr/bin/bash", b""),
        ("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"),
    )
    upper = layer(("usr/bin/.wh.python3.9", b""), ("opt/a/.wh..wh..opq", b""), ("usr/bin/.wh.bash", b""))
    files = read(lower, upper)
    assert list(files.pythons({})) == ["/usr/bin/python3.11"]
    assert not files.has_bash
    assert files.texts == {"etc/passwd": "root:x:0:0::/root:/bin/sh\n"}


@pytest.mark.parametrize(
    "name, content, libc",
    [
        (
            "lib/x86_64-linux-gnu/libc.so.6",
            b"..GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n",
            "2.36",
        ),
        ("usr/lib64/libc.so.6", b"\0GNU C Library (GNU libc) stable release version 2.34.", "2.34"),
        ("lib/aarch64-linux-gnu/libc-2.31.so", b"", "2.31"),
    ],
)
def test_the_c_library_is_found_where_distributions_have_it(name: str, content: bytes, libc: str) -> None:
    assert read(layer((name, content))).libc == f"glibc {libc}"


def test_the_python_that_the_image_finds_first_is_taken() -> None:
    pythons = {
        "/usr/bin/python3.11": "3.11.2",
        "/usr/local/bin/python3.11": "3.11.9",
        "/opt/x/bin/python3.11": "3.11.4",
    }
    usual = ("/usr/local/bin", "/usr/bin")
    assert Base(pythons, usual, has_bash=True).python("3.11.7", "b").version == "3.11.9"
    assert Base(pythons, ("/opt/x/bin", *usual), has_bash=True).python("3.11", "b").path == "/opt/x/bin/python3.11"
    with pytest.raises(FailedPrecondition, match=r"has no Python 3\.12 .*it has: 3\.9, 3\.11\)"):
        Base({**pythons, "/usr/bin/python3.9": "3.9"}, usual, has_bash=True).python("3.12", "b")
    with pytest.raises(FailedPrecondition, match="no bash"):
        Base(pythons, usual).python("3.11", "b")


def test_a_target_names_the_platform_as_uv_does_and_never_a_newer_c_library_than_the_base_has() -> None:
    names = {
        Target(AMD64, "3.11", "glibc 2.36"): "x86_64-manylinux_2_36",
        Target(ARM64, "3.11", "glibc 2.30"): "aarch64-manylinux_2_28",
        Target(ARM64, "3.11", "glibc 2.99"): "aarch64-manylinux_2_40",
        Target(ARM64, "3.11"): "aarch64-manylinux_2_17",
        Target(AMD64, "3.11", "musl"): "x86_64-unknown-linux-musl",
    }
    assert {target: target.name for target in names} == names
    with pytest.raises(FailedPrecondition, match="linux/s390x"):
        assert Target(Platform("linux", "s390x"), "3.11").name


@pytest.mark.parametrize(
    "text, named, more",
    [
        (
            "error: No solution found\n  cause: Because docopt==0.6.2 has no usable wheels and you require docopt\n\n"
            "hint: Wheels are required for `docopt` because building from source is disabled for all packages",
            "docopt",
            "",
        ),
        (
            "error: No solution found\n  cause: Because nvidia-cublas-cu12==12.1.3.1 has no wheels with a matching "
            "platform tag (e.g., `manylinux_2_36_aarch64`) and you require it\n\nhint: Wheels are available for "
            "`nvidia-cublas-cu12` (v12.1.3.1) on the following platforms: `manylinux1_x86_64`, `win_amd64`",
            "nvidia-cublas-cu12",
            "There are wheels for `manylinux1_x86_64`, `win_amd64`.",
        ),
        (
            "error: Building source distributions is disabled, but attempted to build `mine`",
            "mine",
            "--from-source mine",
        ),
    ],
)
def test_a_package_without_a_wheel_is_named_and_only_a_target_makes_it_that_error(
    text: str, named: str, more: str
) -> None:
    failure = parse(text, doing="resolving", target="Python 3.11 on linux/arm64")
    assert (failure.reason, failure.metadata["requirement"]) == ("WHEEL_NOT_FOUND", named)
    assert "linux/arm64" in failure.message and more in failure.message
    assert parse(text, doing="resolving").reason in ("REQUIREMENT_UNSATISFIABLE", "UV_FAILED")


def headers(*wanted: tuple[bytes, int], size_bytes: int = 0, key: bytes = b"comment") -> bytes:
    """A tar with headers of these types and sizes before its only file, whose own says that it has that size."""
    blocks = []
    for kind, size in wanted:
        if kind in (b"S", b"1.0"):
            return sparse(kind, size)
        info = tarfile.TarInfo("long")
        record = b"%d %s=" % (size, key)
        info.type, info.size = kind, size
        content = record + b"x" * (size - len(record) - 1) + b"\n" if kind in b"xg" else b"x" * size
        blocks += [info.tobuf(tarfile.GNU_FORMAT), content, bytes(-size % tarfile.BLOCKSIZE)]
    file = tarfile.TarInfo("usr/bin/bash")
    file.size = size_bytes
    return b"".join([*blocks, file.tobuf(tarfile.GNU_FORMAT), bytes(2 * tarfile.BLOCKSIZE)])


def sparse(kind: bytes, blocks: int) -> bytes:
    """A tar with a sparse file whose map has so many blocks, in the GNU format or in version 1.0 of that of PAX."""
    info = tarfile.TarInfo("sparse")
    if kind == b"S":
        info.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[482] = 1  # more of the map follows
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        piece = b"%011o\0" % 0 * 42
        return bytes(header) + (piece + b"\1" + bytes(7)) * blocks + piece + bytes(8) + bytes(1024)
    info.size = 512 * blocks
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "0"}
    return info.tobuf(tarfile.PAX_FORMAT) + (b"%d\n" % (128 * blocks)).ljust(512, b"0") + b"0\n" * 256 * blocks


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize(
    "wanted",
    [
        *([(kind, (1 << 20) + 512)] for kind in (b"x", b"g", b"L", b"K")),
        [(b"x", 600_000), (b"x", 600_000)],
        [(b"x", 512)] * 400,
        [(b"S", 3000)],
        [(b"1.0", 3000)],
    ],
)
async def test_headers_that_would_fill_the_memory_are_refused(
    wanted: list[tuple[bytes, int]], compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    assert not read(io.BytesIO(compress(headers((b"x", 70_000), (b"L", 4000))))).has_bash  # a long name is its name
    layout = LayoutImageStore(tmp_path)

    async def content() -> AsyncIterator[bytes]:
        yield compress(headers(*wanted))

    descriptor = Descriptor(LAYER, *await layout.write(content()))
    with pytest.raises(FailedPrecondition, match=r"more than 1 MiB|too many headers") as refused:
        async with spooled(descriptor, layout) as spool:
            BaseFiles().add(spool)
    assert refused.value.reason == "LAYER_UNSUPPORTED"


def test_global_headers_are_kept_and_so_they_are_bounded_together() -> None:
    each = [headers((b"g", 300_000), key=key)[: -2 * tarfile.BLOCKSIZE] for key in (b"a", b"b", b"c", b"d")]
    with pytest.raises(tarfile.TarError, match="global headers"):
        read(io.BytesIO(b"".join(each)))


@pytest.mark.parametrize("size_bytes", [-512, -(1 << 20)])
def test_a_negative_size_is_refused_instead_of_read_for_ever(size_bytes: int) -> None:
    with pytest.raises(tarfile.TarError, match="negative size"):
        read(io.BytesIO(headers(size_bytes=size_bytes)))
    info = tarfile.TarInfo("usr/bin/bash")
    info.pax_headers = {"size": str(size_bytes)}
    said = info.tobuf(tarfile.PAX_FORMAT)
    with pytest.raises(tarfile.TarError, match="negative size"):
        read(io.BytesIO(said + bytes(2 * tarfile.BLOCKSIZE)))


def test_members_are_not_remembered() -> None:
    names = [f"opt/{number}" for number in range(3)]
    with opened(layer(*((name, b"content") for name in names))) as archive:
        assert [member.name for member in members(archive)] == names and not archive.getmembers()
