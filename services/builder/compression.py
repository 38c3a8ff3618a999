"""How a layer is packed: which method for which layer and which target, and the bytes.

A packed layer is a row of pieces of at most 1 MiB, each compressed by itself: gzip members or zstd frames, which every
reader takes for one stream. So pieces are compressed on every core, in bounded memory, and any of them can be read
alone. What a piece becomes depends on its bytes, the method, and the version of the library, never on the machine:
libdeflate and zstd give the same on every CPU (isal does not: without SSE4.2 its output is another), so both are
pinned exactly, and `Method.made_by` is part of a layer's key and stands in the manifest.

What is pulled lazily has its table of contents from `lazy_layers`.

Source: RFC 1952, section 2.2 ("members"); RFC 8878, section 3 ("frames"); measurements in docs/images.md.
"""

import fnmatch
import functools
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import deflate
import zstandard

from ekiben.errors import InvalidArgument
from services.builder.layers import Entry, tar
from services.builder.lazy_layers import LazyLayer, has_table, in_order
from services.content.digest import Digest
from services.content.images import LAYER, LAYER_GZIP, LAYER_ZSTD

ANNOTATION = "dev.ekiben.compression"
"""On the descriptor of a packed layer: what made its bytes, so that they can be made again."""
_GZIP_LEVEL = 1
"""Level 6 takes twice the CPU for 8 % less."""
_ZSTD_LEVEL = 3
"""Level 6 takes twice the CPU for 6 % less."""
_WORTH = 0.9
"""Weights are compressed where a sample shrinks to less than this: below, a node unpacks slower than it pulls."""
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 17


class Method(StrEnum):
    """How layers are packed for a target."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    ESTARGZ = "estargz"
    ZSTD_CHUNKED = "zstd:chunked"

    @property
    def is_lazy(self) -> bool:
        """Whether a node may run what it has not pulled whole: each file can be fetched alone."""
        return self in (Method.ESTARGZ, Method.ZSTD_CHUNKED)

    @property
    def media_type(self) -> str:
        """Of a layer that is packed so."""
        return {Method.NONE: LAYER, Method.GZIP: LAYER_GZIP, Method.ESTARGZ: LAYER_GZIP}.get(self, LAYER_ZSTD)

    def made_by(self, *, dense: bool = False) -> str:
        """What makes the bytes: library, version and level. Others may give other bytes for the same content."""
        if self is Method.NONE:
            return ""
        if self.media_type == LAYER_GZIP:
            return f"{self}; deflate {deflate.__version__}; level {0 if dense else _GZIP_LEVEL}"
        return f"{self}; zstandard {zstandard.__version__}; level {_ZSTD_LEVEL}"

    def pack(self, piece: bytes, *, dense: bool = False) -> bytes:
        """One piece, to be read by itself or after others. `dense`: what does not shrink is not worth trying."""
        if self is Method.NONE:
            return piece
        if self.media_type == LAYER_GZIP:
            return bytes(deflate.gzip_compress(piece, 0 if dense else _GZIP_LEVEL))
        # A compressor is for one thread at a time, and costs microseconds. zstd itself sees what does not shrink.
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compress(piece)


def method(text: str) -> Method:
    """Read a method. Raises InvalidArgument (COMPRESSION_INVALID)."""
    try:
        return Method(text.strip())
    except ValueError:
        raise InvalidArgument(
            f"The compression {text!r} is not known; it is one of: {', '.join(Method)}.",
            reason="COMPRESSION_INVALID",
            compression=text,
        ) from None


@dataclass(frozen=True)
class Rules:
    """Which method for which target; the first that matches counts, gzip where none does."""

    rules: Sequence[tuple[str, Method]] = ()

    @classmethod
    def parse(cls, text: str) -> "Rules":
        """Read `zstd`, or `registry.example.com=zstd,docker.io/team/*=gzip,*=none`.

        A pattern without a slash is a registry's host (and port); `*` and `?` stand for other characters. A layout on
        disk is named by its folder.

        Raises:
            InvalidArgument: a method that there is not (COMPRESSION_INVALID).
        """
        found = []
        for rule in filter(None, (each.strip() for each in text.split(","))):
            pattern, _, name = rule.rpartition("=")
            found.append((pattern.strip() or "*", method(name)))
        return cls(tuple(found))

    def of(self, target: str) -> Method:
        """For images that go to `target`: `docker://HOST/REPOSITORY:TAG`, `oci:FOLDER`, …"""
        place = target.partition(":")[2].removeprefix("//")
        for pattern, found in self.rules:
            if fnmatch.fnmatchcase(place if "/" in pattern else place.split("/")[0], pattern):
                return found
        return Method.GZIP


def at_most_for_weights(target: Method) -> Method:
    """The method that `for_weights` may choose besides none: what a model's layer must be known by."""
    return Method.NONE if target is Method.GZIP else target


def for_weights(target: Method, entries: Sequence[Entry]) -> tuple[Method, bool]:
    """How a model's layer is packed where code is packed by `target`, and whether it is dense: as it is, unless zstd
    or lazy pulling is for it. zstd alone only where a sample of the files shrinks by more than a tenth; what is pulled
    lazily is packed anyway. Depends on the files' content only. Blocks."""
    most = at_most_for_weights(target)
    if most is Method.NONE:
        return most, False
    dense = not shrinks(entries)
    return (Method.NONE if dense and not most.is_lazy else most), dense


def shrinks(entries: Sequence[Entry]) -> bool:
    """Whether a sample of the files, 2 MiB from evenly spread places, is worth compressing. Blocks."""
    files = [(each.path, each.path.stat().st_size) for each in entries if each.path is not None]
    total, before, after = sum(size for _, size in files), 0, 0
    places = deque(total * number // _SAMPLES for number in range(_SAMPLES))
    start = 0
    for path, size in files:
        with path.open("rb", buffering=0) as file:
            while places and places[0] < start + size:
                file.seek(max(places.popleft() - start, 0))
                sample = file.read(_SAMPLE_BYTES)
                before, after = before + len(sample), after + len(Method.ZSTD.pack(sample))
        start += size
    return after < before * _WORTH


@dataclass
class Packed:
    """The bytes of a layer as they are made, once; what is known at their end."""

    entries: Iterable[Entry]
    method: Method
    dense: bool = False
    annotations: dict[str, str] = field(default_factory=dict)
    """For the descriptor; whole once the iteration has ended."""
    _hashed: "hashlib._Hash | None" = None

    @property
    def media_type(self) -> str:
        """Of the layer."""
        return self.method.media_type

    def diff_id(self, digest: Digest) -> Digest:
        """The digest of the tar, where `digest` is that of the packed bytes. Once the iteration has ended."""
        return digest if self._hashed is None else Digest(self._hashed.hexdigest())

    def __iter__(self) -> Iterator[bytes]:
        """Chunks of at most about 1 MiB. Blocks."""
        if self.method is Method.NONE:  # whoever keeps them hashes them: once is enough
            yield from tar(self.entries)
            return
        self.annotations[ANNOTATION] = self.method.made_by(dense=self.dense)
        self._hashed = hashlib.sha256()
        pack = functools.partial(self.method.pack, dense=self.dense)
        entries = list(self.entries)
        if self.method.is_lazy and has_table(entries):
            lazy = LazyLayer(entries, pack, self._hashed, estargz=self.method is Method.ESTARGZ)
            yield from lazy
            self.annotations |= lazy.annotations
        else:
            yield from in_order(self._plain(entries, self._hashed), pack)

    @staticmethod
    def _plain(entries: Iterable[Entry], hashed: "hashlib._Hash") -> Iterator[bytes]:
        for chunk in tar(entries):
            hashed.update(chunk)
            yield chunk
