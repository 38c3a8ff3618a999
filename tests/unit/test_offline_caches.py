"""The cache of `ekiben images build`: who waits for whom."""

import asyncio
import fcntl
from pathlib import Path
from typing import Any

import pytest

from services.builder import offline, offline_caches
from services.content.digest import Digest
from services.content.images import MANIFEST, Descriptor

DIGEST = Digest("d" * 64)


async def test_a_build_says_that_it_waits_and_can_be_ended_meanwhile(tmp_path: Path) -> None:
    said: list[str] = []
    waits, begun = asyncio.Event(), asyncio.Event()

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    async def build() -> None:
        async with offline_caches.used(tmp_path, say):
            begun.set()

    with (tmp_path / ".builds.lock").open("wb") as tidying:
        fcntl.flock(tidying, fcntl.LOCK_EX)
        building, ended = asyncio.create_task(build()), asyncio.create_task(build())
        await asyncio.wait_for(waits.wait(), 60)
        ended.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ended
        assert not begun.is_set()
    await asyncio.wait_for(building, 60)
    assert begun.is_set() and len(said) == 2 and "to be tidied" in said[0]


def test_the_digest_is_told_before_the_cache_is_tidied_and_whatever_comes_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []

    async def build(*_: Any, **__: Any) -> Descriptor:
        return Descriptor(MANIFEST, DIGEST, 1)

    async def prune(cache: Path) -> None:
        printed.append(capsys.readouterr().out)
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(offline, "build", build)
    monkeypatch.setattr(offline_caches, "prune", prune)
    assert offline.main(["bento:1", "--output", f"oci:{tmp_path}/images", "--cache", str(tmp_path)]) == 0
    assert printed == [f"{DIGEST}\n"]
    assert "could not be tidied: what nobody thought of" in capsys.readouterr().err
