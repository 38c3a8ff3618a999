"""What a layer becomes when it is packed depends on its content and its method, and can be read by others."""

import gzip
import hashlib
import io
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
from services.builder.settings import Settings
from services.content.digest import Digest
from services.kernel.settings import SettingsError

# A row of bytes that no library of the machine makes: what is pinned is the compressors', not Python's.
CONTENT = b"".join(hashlib.sha256(str(number % 5000).encode()).hexdigest().encode() for number in range(60_000))
ENTRIES = [Entry("app/data", data=CONTENT), Entry("app/empty", data=b""), Entry("app/run", data=b"#!", executable=True)]


def unpacked(method: Method, data: bytes) -> bytes:
    if method in (Method.ZSTD, Method.ZSTD_CHUNKED):
        return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return data if method is Method.NONE else gzip.decompress(data)


@pytest.mark.parametrize("method", [Method.NONE, Method.GZIP, Method.ZSTD, Method.ZSTD_CHUNKED])
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
        (Method.GZIP, "9d6a5917dfa88ed1f5409a86b4f8ce23a5e4bb8a6d2ba42b0d2e1bb7b38db715"),
        (Method.ZSTD, "c2d26257c0c4e1451cf74bcefcf023b7a3c597fd69c9645c2c6ad2f0af811935"),
        (Method.ESTARGZ, "6b623b18a6f2ebddd85b393d4931bc11d51b923a673e1a6d01e64573efe1fa10"),
        (Method.ZSTD_CHUNKED, "2542d10aaa3eae5ce90e4335f90c89d7183ecf73cfd968c67b867a7e4f29fc34"),
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
    assert [for_weights(each, dense)[0] for each in Method] == [Method.NONE] * 3 + [Method.ESTARGZ, Method.ZSTD_CHUNKED]
    assert for_weights(Method.ESTARGZ, dense)[1] and not for_weights(Method.NONE, dense)[1]
    (tmp_path / "weights.bin").write_bytes(random.randbytes(1 << 20) + bytes(3 << 20))
    sparse = list(entries_of(tmp_path, "model"))
    assert for_weights(Method.ZSTD, sparse) == (Method.ZSTD, False)
    assert for_weights(Method.GZIP, sparse) == (Method.NONE, False)
    assert for_weights(Method.ZSTD, [Entry("nothing")]) == (Method.NONE, True)


def test_a_rule_says_what_a_registry_gets() -> None:
    rules = Rules.parse("old.example.com:5000=gzip, ghcr.io/team/*=zstd,*.example.com=zstd, *=none")
    assert rules.of("docker://old.example.com:5000/a/b:1") is Method.GZIP
    assert rules.of("docker://ghcr.io/team/bento@sha256:00") is Method.ZSTD
    assert rules.of("docker://ghcr.io/other/bento") is Method.NONE
    assert rules.of("docker://new.example.com/a:1") is Method.ZSTD
    assert rules.of("oci:/srv/images") is Method.NONE
    assert Rules.parse("").of("oci:images") is Method.GZIP
    assert Rules.parse("zstd").of("docker-archive:x.tar") is Method.ZSTD
    with pytest.raises(InvalidArgument, match="one of: none, gzip, zstd, estargz, zstd:chunked"):
        Rules.parse("*=lzma")


def test_a_builder_with_a_method_that_there_is_not_does_not_start(tmp_path: Path) -> None:
    for method in Method:
        Settings(database_url="sqlite:///b.db", data_dir=tmp_path, images_compression=f"a.example.com={method}, *=gzip")
    with pytest.raises(SettingsError, match="'b=lzma'; its method must be one of none, gzip"):
        Settings(database_url="sqlite:///b.db", data_dir=tmp_path, images_compression="gzip,b=lzma")


def test_every_method_is_read_by_tarfile(tmp_path: Path) -> None:
    path = tmp_path / "layer.tar.gz"
    path.write_bytes(b"".join(Packed(ENTRIES, Method.GZIP)))
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["app", "app/data", "app/empty", "app/run"]


def test_pieces_do_not_depend_on_how_much_a_file_system_gives_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_bytes(CONTENT)
    whole = [b"".join(Packed(list(entries_of(tmp_path, "app")), method)) for method in Method]
    opened = Path.open

    class Short(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size, 300_000) if size and size > 0 else size)

    def short(path: Path, mode: str = "r", buffering: int = -1) -> io.IOBase:
        return Short(path) if (mode, buffering) == ("rb", 0) else opened(path, mode, buffering)

    monkeypatch.setattr(Path, "open", short)
    assert whole == [b"".join(Packed(list(entries_of(tmp_path, "app")), method)) for method in Method]


def test_names_that_no_table_can_hold_are_packed_without_one() -> None:
    odd = [*ENTRIES, Entry("app/\udce9", data=b"1")]
    packed = Packed(odd, Method.ESTARGZ)
    assert gzip.decompress(b"".join(packed)) == b"".join(tar(odd))
    assert list(packed.annotations) == ["dev.ekiben.compression"]
