"""Layers of which a node fetches single files while a container runs: eStargz and zstd:chunked.

Both are ordinary gzip and zstd layers to everybody else: each piece of a file's content is a member or frame of its
own, headers lie in pieces between them, and a table of contents at the end says where each begins and what it hashes
to. The annotations carry the table's digest: whoever trusts the manifest can trust the table, and so each file alone.

Source: stargz-snapshotter, docs/estargz.md; containers/storage, pkg/chunked (`TOC`, `ZstdChunkedFooterData`);
vbatts/tar-split, storage (`Entry`).
"""

import base64
import hashlib
import itertools
import json
import os
import struct
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastcrc import crc64

from services.builder.layers import END, Entry, header, runs

_THREADS = min(os.cpu_count() or 1, 4)
"""One build must not take a whole machine; memory is a few MiB for each."""
_LANDMARK = Entry(".no.prefetch.landmark", data=b"\x0f")
_TOC = "stargz.index.json"
_SKIPPABLE = b"\x50\x2a\x4d\x18"
_MAGIC = b"GNUlInUx"
_CHUNKED = "io.github.containers.zstd-chunked"
_EPOCH = "1970-01-01T00:00:00Z"

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(pieces: Iterable[Item], pack: Callable[[Item], Result]) -> Iterator[Result]:
    """What `pack` makes of each, on several threads, in the order of the pieces; no more than a few are in memory."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pack") as threads:
        try:
            for piece in pieces:
                waiting.append(threads.submit(pack, piece))
                if len(waiting) > 2 * _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def has_table(entries: Iterable[Entry]) -> bool:
    """Whether every name can stand in a table of contents, which is JSON."""
    try:
        "".join(f"{each.name}{each.link}" for each in entries).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class _Part:
    """A file's piece as it lies in the layer."""

    start: int
    size: int
    at: int
    end: int
    digest: str


@dataclass
class _File:
    info: tarfile.TarInfo
    parts: list[_Part] = field(default_factory=list)
    hashed: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    """Of content in several pieces; of one, the piece's digest is the file's."""
    checksum: int = 0

    @property
    def name(self) -> str:
        """As Go's reader of tars has it."""
        return f"{self.info.name}/" if self.info.isdir() else self.info.name

    def entries(self, *, estargz: bool) -> Iterator[dict[str, Any]]:
        """Its lines in the table."""
        info = self.info
        kind = "dir" if info.isdir() else "symlink" if info.issym() else "reg"
        found: dict[str, Any] = {"type": kind, "name": self.name, "mode": info.mode}
        found |= {"linkName": info.linkname} if info.linkname else {}
        found |= {"uid": info.uid, "gid": info.gid} if info.uid else {}
        found |= {} if estargz else {"modtime": _EPOCH}
        if not self.parts:
            empty = {"digest": f"sha256:{hashlib.sha256().hexdigest()}"}
            yield found | (empty if estargz and kind == "reg" else {})
            return
        one = len(self.parts) == 1
        found |= {"size": info.size, "digest": self.parts[0].digest if one else f"sha256:{self.hashed.hexdigest()}"}
        found |= {} if estargz else {"endOffset": self.parts[-1].end}
        for number, part in enumerate(self.parts):
            entry = {"type": "chunk", "name": self.name, "chunkOffset": part.start} if number else found
            sized = {} if one else {"chunkSize": part.size}
            yield entry | {"offset": part.at, "chunkDigest": part.digest} | sized


@dataclass(frozen=True)
class _Piece:
    data: bytes
    file: _File | None = None
    start: int = 0


class LazyLayer:
    """The bytes of such a layer as they are made, once; its annotations at their end."""

    def __init__(
        self, entries: Iterable[Entry], pack: Callable[[bytes], bytes], hashed: "hashlib._Hash", *, estargz: bool
    ) -> None:
        """`pack` makes a member or a frame of a piece; `hashed` is given what the layer unpacks to."""
        self.annotations: dict[str, str] = {}
        self._entries = itertools.chain(entries, [_LANDMARK]) if estargz else entries
        self._pack = pack
        self._hashed = hashed
        self._tar_bytes = 0
        self._estargz = estargz
        self._files: list[_File] = []
        self._split = _TarSplit()

    def __iter__(self) -> Iterator[bytes]:
        """Chunks of about 1 MiB at most; the table may be larger. Blocks."""
        at = 0
        for piece, packed, digest in in_order(self._pieces(), self._packed):
            if piece.file is not None:
                part = _Part(piece.start, len(piece.data), at, at + len(packed), digest)
                piece.file.parts.append(part)
            at += len(packed)
            yield packed
        table = {"version": 1, "entries": list(self._lines())}
        yield from self._gzip_end(table, at) if self._estargz else self._zstd_end(table, at)

    def _lines(self) -> Iterator[dict[str, Any]]:
        for file in self._files:
            yield from file.entries(estargz=self._estargz)

    def _pieces(self) -> Iterator[_Piece]:
        """Content in its pieces, what lies between in one piece each."""
        between: list[bytes] = []
        for run in runs(self._entries):
            self._unpacked(run.data)
            if run.offset < 0:
                between.append(run.data)
                self._split.add(run.data)
                if run.info is not None:
                    self._split.cut(self._files[-1:])
                    self._files.append(_File(run.info))
                continue
            if between:
                yield _Piece(b"".join(between))
                between.clear()
            file = self._files[-1]
            file.checksum = crc64.go_iso(run.data, file.checksum)
            if file.info.size > len(run.data):
                file.hashed.update(run.data)
            yield _Piece(run.data, file, run.offset)
        if not self._estargz:  # whose table is itself a file of the tar, so that the tar ends behind it
            self._unpacked(END)
            between.append(END)
            self._split.add(END)
        self._split.cut(self._files[-1:])
        if between:
            yield _Piece(b"".join(between))

    def _packed(self, piece: _Piece) -> tuple[_Piece, bytes, str]:
        digest = f"sha256:{hashlib.sha256(piece.data).hexdigest()}" if piece.file else ""
        return piece, self._pack(piece.data), digest

    def _unpacked(self, data: bytes) -> None:
        self._hashed.update(data)
        self._tar_bytes += len(data)

    def _gzip_end(self, table: dict[str, Any], at: int) -> Iterator[bytes]:
        content = _json(table)
        info = tarfile.TarInfo(_TOC)
        info.size, info.mode = len(content), 0o644
        member = header(info) + content + bytes(-len(content) % tarfile.BLOCKSIZE) + END
        self._unpacked(member)
        yield self._pack(member)
        # An empty member whose header says where the table begins; its length is how readers find it.
        extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % at
        yield b"\x1f\x8b\x08\x04" + bytes(4) + b"\x00\xff" + struct.pack("<H", len(extra)) + extra
        yield b"\x01\x00\x00\xff\xff" + bytes(8)
        self.annotations = {
            "containerd.io/snapshot/stargz/toc.digest": f"sha256:{hashlib.sha256(content).hexdigest()}",
            "io.containers.estargz.uncompressed-size": str(self._tar_bytes),
        }

    def _zstd_end(self, table: dict[str, Any], at: int) -> Iterator[bytes]:
        split = self._pack(self._split.content())
        table["tarSplitDigest"] = f"sha256:{hashlib.sha256(split).hexdigest()}"
        plain = _json(table)
        packed = self._pack(plain)
        table_at = at + 8
        split_at = table_at + len(packed) + 8
        places = (table_at, len(packed), len(plain), 1, split_at, len(split), self._split.size_bytes)
        for frame in (packed, split, struct.pack("<7Q", *places) + _MAGIC):
            yield _SKIPPABLE + struct.pack("<I", len(frame)) + frame
        self.annotations = {
            f"{_CHUNKED}.manifest-checksum": f"sha256:{hashlib.sha256(packed).hexdigest()}",
            f"{_CHUNKED}.manifest-position": f"{table_at}:{len(packed)}:{len(plain)}:1",
            f"{_CHUNKED}.tarsplit-position": f"{split_at}:{len(split)}:{self._split.size_bytes}",
        }


class _TarSplit:
    """What of the tar is no content, so that a node that fetched files alone can say what the layer unpacks to."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._waiting: list[bytes] = []

    @property
    def size_bytes(self) -> int:
        """Of `content`."""
        return sum(map(len, self._lines))

    def add(self, data: bytes) -> None:
        """What stands there."""
        self._waiting.append(data)

    def cut(self, before: list[_File]) -> None:
        """What was added last, after the content of `before`, is whole: a header, or the tar's end."""
        for file in before:
            size = file.info.size
            sized = {"size": size} if size else {}
            self._line({"type": 1, "name": file.name} | sized, struct.pack(">Q", file.checksum) if size else b"")
        self._line({"type": 2}, b"".join(self._waiting))
        self._waiting.clear()

    def content(self) -> bytes:
        """The whole."""
        return b"".join(self._lines)

    def _line(self, entry: dict[str, Any], payload: bytes) -> None:
        entry |= {"payload": base64.b64encode(payload).decode(), "position": len(self._lines)}
        self._lines.append(_json(entry) + b"\n")


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
