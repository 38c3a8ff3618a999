"""What a download that was killed has left of an archive, and how it is read again as the archive that it was.

A folder for each download, which one process at a time holds:

    lock     held while somebody downloads
    tree/    the files, written one after another
    files    a line for each file that was begun: where its bytes begin in the archive, how many there are, its path
    rest     all other bytes of the archive (headers, padding), in order

The archive's first bytes are those two put together again, as far as they go: they are hashed once more from the
disk, and the rest comes from the server. Nothing is synced. After a loss of power what is there may be wrong; then the
digest says so, and the download begins anew.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class _Begun:
    offset: int
    size: int
    path: str
    there: int


class Kept:
    """The bytes that are there, and those that come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, folder / "tree"
        self._files, self._rest = folder / "files", folder / "rest"
        self._begun: list[_Begun] = []
        self._rest_bytes = 0
        self.there_bytes = 0
        """How many of the archive's first bytes are there."""
        self._load()
        self._outs: list[BinaryIO] = []

    def _load(self) -> None:
        self.tree.mkdir(exist_ok=True)
        rest = self._rest.stat().st_size if self._rest.exists() else 0
        seen: set[str] = set()
        for offset, size, path in self._lines():
            gap = offset - self.there_bytes
            if path in seen:  # Written twice: what was there first is gone.
                return self._clear()
            if gap < 0 or gap > rest - self._rest_bytes:
                break
            seen.add(path)
            file = self.tree / path
            there = min(size, file.stat().st_size) if file.is_file() else 0
            self._begun.append(_Begun(offset, size, path, there))
            self._rest_bytes += gap
            self.there_bytes = offset + there
            if there < size:
                break
        else:
            self.there_bytes += rest - self._rest_bytes
            self._rest_bytes = rest
        self._files.write_text("".join(_line(b.offset, b.size, b.path) for b in self._begun))
        with self._rest.open("ab") as file_:
            file_.truncate(self._rest_bytes)
        return None

    def _lines(self) -> Iterator[tuple[int, int, str]]:
        with contextlib.suppress(OSError, ValueError, TypeError):
            for line in self._files.read_text().splitlines():
                offset, size, path = json.loads(line)
                yield int(offset), int(size), str(path)

    def _clear(self) -> None:
        shutil.rmtree(self.tree)
        self.tree.mkdir()
        self._files.write_text("")
        self._rest.write_bytes(b"")
        self._begun, self._rest_bytes, self.there_bytes = [], 0, 0

    # Reading what is there

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """The archive's first `there_bytes` bytes."""
        with self._rest.open("rb") as rest:
            at = 0
            for begun in self._begun:
                yield from _some(rest, begun.offset - at, size)
                with contextlib.ExitStack() as stack:
                    if begun.there:
                        file = stack.enter_context((self.tree / begun.path).open("rb"))
                        yield from _some(file, begun.there, size)
                at = begun.offset + begun.there
            yield from _some(rest, self.there_bytes - at, size)

    def there_of(self, offset: int) -> int | None:
        """How many bytes are there of the file whose bytes begin at `offset`; None where it was not begun."""
        return next((begun.there for begun in self._begun if begun.offset == offset), None)

    # Writing what comes

    def begin(self, offset: int, size: int, path: Path) -> None:
        """A file follows."""
        name = os.path.relpath(path, self.tree)
        self._append(self._files, _line(offset, size, name).encode())

    def keep(self, at: int, data: bytes | memoryview) -> None:
        """Bytes that are of no file, and which begin at `at`; what of them is there already is left out."""
        if at + len(data) > self.there_bytes:
            self._append(self._rest, data[max(0, self.there_bytes - at) :])

    def _append(self, path: Path, data: bytes | memoryview) -> None:
        if not self._outs:
            self._outs = [self._rest.open("ab", buffering=0), self._files.open("ab", buffering=0)]
        self._outs[0 if path is self._rest else 1].write(data)

    def close(self) -> None:
        """Close the files; what is there stays."""
        for out in self._outs:
            out.close()
        self._outs = []


def _line(offset: int, size: int, path: str) -> str:
    return json.dumps([offset, size, path]) + "\n"


def _some(file: BinaryIO, count: int, size: int) -> Iterator[bytes]:
    while count > 0 and (data := file.read(min(size, count))):
        yield data
        count -= len(data)
