"""The content of a model or a bento on its way from the registry."""

import gzip
import hashlib
import os

import pytest

from ekiben.errors import DataLoss, Unavailable
from services.content import tar
from services.content.digest import Digest
from services.content.fetching import Incoming


def incoming(content: bytes, of: bytes = b"") -> Incoming:
    coming = Incoming(Digest(hashlib.sha256(of or content).hexdigest()), len(content))
    step = len(content) // 6 + 1
    for at in range(0, len(content), step):
        assert coming.offer(content[at : at + step])
    coming.end()
    return coming


def test_as_many_bytes_are_read_as_were_asked_for() -> None:
    content = os.urandom(10_000)
    coming = incoming(content)
    assert (coming.peek(2), coming.read(7), coming.skip(3000)) == (content[:2], content[:7], 3000)
    assert coming.read(5000) + coming.read(9000) + coming.read(1) == content[3007:]


def test_a_zipped_archive_may_unpack_to_what_its_size_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_FREE_BYTES", 1000)
    content = os.urandom(10_000)
    with incoming(gzip.compress(content)).checked() as source:
        assert source.read(20_000) == content


def test_other_bytes_than_were_named_are_an_error_at_the_end() -> None:
    with pytest.raises(DataLoss), incoming(b"one", of=b"other").checked() as source:
        assert source.read(3) == b"one"


def test_what_broke_off_is_raised_where_it_is_read() -> None:
    coming = Incoming(Digest("0" * 64), 10)
    coming.offer(b"12345")
    coming.end(Unavailable("It broke off.", reason="BLOBS_UNAVAILABLE"))
    with pytest.raises(Unavailable):
        coming.read(10)
