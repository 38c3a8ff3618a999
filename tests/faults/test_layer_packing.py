"""Layers while their files change, while whoever makes them dies, and in little memory."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ekiben.errors import Aborted
from services.builder.assembler import _of
from services.builder.compression import Method, Packed
from services.builder.layers import entries_of
from services.content.images.layout import LayoutImageStore

ROOT = Path(__file__).parents[2]
MAKE = """
import asyncio, sys
from pathlib import Path
from services.builder.assembler import _of
from services.builder.compression import Method, Packed
from services.builder.layers import entries_of
from services.content.images.layout import LayoutImageStore

def chunks(packed, stop):
    for number, chunk in enumerate(packed):
        yield chunk
        if number == stop:
            print("half", flush=True)
            sys.stdin.read()

source, target, method, stop = sys.argv[1:]
packed = Packed(list(entries_of(Path(source), "model")), Method(method), dense=True)
print(asyncio.run(LayoutImageStore(Path(target)).write(_of(chunks(packed, int(stop)))))[0])
# Not getrusage's: that begins with what the process had in memory which started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def maker(*arguments: object) -> list[str]:
    return [sys.executable, "-c", MAKE, *map(str, arguments)]


@pytest.mark.parametrize("method", list(Method))
async def test_a_file_that_shrinks_while_it_is_packed_leaves_nothing(method: Method, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(64 << 20)
    store = LayoutImageStore(tmp_path / "layout")
    packed = iter(Packed(list(entries_of(folder, "model")), method))

    def chunks() -> Iterator[bytes]:
        yield next(packed)
        os.truncate(folder / "weights.bin", 0)
        yield from packed

    with pytest.raises(Aborted, match="Build again"):
        await store.write(_of(chunks()))
    assert list((tmp_path / "layout" / "blobs" / "sha256").iterdir()) == []


@pytest.mark.parametrize("method", [Method.NONE, Method.ZSTD_CHUNKED])
def test_a_maker_killed_in_the_middle_is_followed_by_one_that_ends_with_the_same_digest(
    method: Method, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(os.urandom(8 << 20))
    layout = tmp_path / "layout"
    with subprocess.Popen(maker(folder, layout, method, 3), cwd=ROOT, stdin=-1, stdout=-1, text=True) as killed:
        assert killed.stdout is not None and killed.stdout.readline() == "half\n"
        killed.send_signal(signal.SIGKILL)
    whole = [path for path in (layout / "blobs" / "sha256").iterdir() if not path.name.startswith(".")]
    assert whole == []
    done = subprocess.run(maker(folder, layout, method, -1), cwd=ROOT, capture_output=True, text=True, check=True)
    digest = done.stdout.split()[0].removeprefix("sha256:")
    fresh = asyncio.run(
        LayoutImageStore(tmp_path / "other").write(_of(Packed(list(entries_of(folder, "model")), method, dense=True)))
    )
    assert (digest, (layout / "blobs" / "sha256" / digest).stat().st_size) == (fresh[0].hex, fresh[1])


@pytest.mark.parametrize("method", [Method.NONE, Method.ESTARGZ, Method.ZSTD_CHUNKED])
def test_memory_does_not_grow_with_the_model(method: Method, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(512 << 20)
    done = subprocess.run(
        maker(folder, tmp_path / "layout", method, -1), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[1]) < 200 << 10  # KiB: 80 of them are Python with what it imports
