"""What a layer becomes when it is packed depends on its content and its method, and can be read by others."""

import gzip
import hashlib
import random
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from ekiben.errors import InvalidArgument
from services.builder.compression import Method, Packed, Rules, for_weights, in_order
from services.builder.layers import Entry, entries_of, tar
from services.content.digest import Digest

# A row of bytes that no library of the machine makes: what is pinned is the compressors', not Python's.
CONTENT = b"".join(hashlib.sha256(str(number % 5000).encode()).hexdigest().encode() for number in range(60_000))
ENTRIES = [Entry("app/data", data=CONTENT), Entry("app/empty", data=b""), Entry("app/run", data=b"#!", executable=True)]


def unpacked(method: Method, data: bytes) -> bytes:
    if method is Method.ZSTD:
        return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return gzip.decompress(data) if method is Method.GZIP else data


@pytest.mark.parametrize("method", [Method.NONE, Method.GZIP, Method.ZSTD])
def test_what_is_packed_is_the_tar(method: Method) -> None:
    packed = Packed(ENTRIES, method)
    data = b"".join(packed)
    plain = b"".join(tar(ENTRIES))
    assert unpacked(method, data) == plain
    digest = Digest(hashlib.sha256(data).hexdigest())
    assert packed.diff_id(digest).hex == hashlib.sha256(plain).hexdigest()
    assert (len(data) < len(plain) * 0.7) == (method is not Method.NONE)
    assert data == b"".join(Packed(ENTRIES, method))


@pytest.mark.parametrize(
    ("method", "digest"),
    [
        (Method.NONE, "72cf5efb0b339fbf6a9fc7bbeb1a6c0c7dbe5008ad2ed6a3412df1c66c6b294b"),
        (Method.GZIP, "6d80899e8d083298a67a2eddca8c930ca687477a654658499b7a11a6ba735610"),
        (Method.ZSTD, "f6bb7fe20fc825bd3f025164c0deaa1e70d6d9b0ae86a940dca0898f10bd8a96"),
    ],
)
def test_equal_content_has_the_digest_it_always_had(method: Method, digest: str) -> None:
    """Fails where a library's update gives images other digests: then say so in the change log (docs/adr/0029)."""
    assert hashlib.sha256(b"".join(Packed(ENTRIES, method))).hexdigest() == digest


def test_pieces_come_in_order_and_few_at_a_time() -> None:
    asked, alive, most, lock = 0, 0, 0, threading.Lock()

    def pieces() -> Iterator[bytes]:
        nonlocal asked, alive, most
        for number in range(200):
            with lock:
                asked, alive = asked + 1, alive + 1
                most = max(most, alive)
            yield str(number).encode()

    found = []
    for piece in in_order(pieces(), lambda piece: piece * 2):
        with lock:
            alive -= 1
        found.append(piece)
    assert found == [str(number).encode() * 2 for number in range(200)]
    assert (asked, most <= 10) == (200, True)


def test_a_piece_that_cannot_be_had_ends_it_with_its_own_error() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"1"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(in_order(pieces(), bytes))
    with pytest.raises(ZeroDivisionError):
        list(in_order([b"1", b"2"], lambda piece: bytes(1 // 0)))


def test_weights_are_packed_where_a_sample_shrinks(tmp_path: Path) -> None:
    random.seed(5)
    (tmp_path / "weights.bin").write_bytes(random.randbytes(3 << 20))
    (tmp_path / "config.json").write_text("{}")
    dense = list(entries_of(tmp_path, "model"))
    assert [for_weights(each, dense) for each in Method] == [Method.NONE] * len(Method)
    (tmp_path / "weights.bin").write_bytes(random.randbytes(1 << 20) + bytes(3 << 20))
    sparse = list(entries_of(tmp_path, "model"))
    assert for_weights(Method.ZSTD, sparse) is Method.ZSTD
    assert for_weights(Method.GZIP, sparse) is Method.NONE
    assert for_weights(Method.ZSTD, [Entry("nothing")]) is Method.NONE


def test_a_rule_says_what_a_registry_gets() -> None:
    rules = Rules.parse("old.example.com:5000=gzip, ghcr.io/team/*=zstd,*.example.com=zstd, *=none")
    assert rules.of("docker://old.example.com:5000/a/b:1") is Method.GZIP
    assert rules.of("docker://ghcr.io/team/bento@sha256:00") is Method.ZSTD
    assert rules.of("docker://ghcr.io/other/bento") is Method.NONE
    assert rules.of("docker://new.example.com/a:1") is Method.ZSTD
    assert rules.of("oci:/srv/images") is Method.NONE
    assert Rules.parse("").of("oci:images") is Method.GZIP
    assert Rules.parse("zstd").of("docker-archive:x.tar") is Method.ZSTD
    with pytest.raises(InvalidArgument, match="one of: none, gzip, zstd"):
        Rules.parse("*=lzma")


def test_every_method_is_read_by_tarfile(tmp_path: Path) -> None:
    path = tmp_path / "layer.tar.gz"
    path.write_bytes(b"".join(Packed(ENTRIES, Method.GZIP)))
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["app", "app/data", "app/empty", "app/run"]
