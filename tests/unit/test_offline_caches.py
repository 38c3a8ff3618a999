"""The cache of `ekiben images build`: whose folder it may be, by which rules it is tidied, and who waits for whom."""

import asyncio
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition
from services.builder import offline, offline_caches
from services.builder.app import _owner
from services.builder.caches import Kind
from services.content.digest import Digest
from services.content.images import MANIFEST, Descriptor
from services.kernel.leases import id_kept_in
from services.kernel.settings import SettingsError

DAY_S = 86_400.0
DIGEST = Digest("d" * 64)


def of_a_server(folder: Path, what: str) -> None:
    """As a builder leaves it that was started there."""
    if what == "site":
        id_kept_in(folder / "site")
    else:
        with _owner(folder):
            pass


@pytest.mark.parametrize("what", ["owner", "site"])
async def test_a_folder_of_a_server_is_refused_in_words_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    of_a_server(tmp_path, what)
    old = tmp_path / "environments" / "old"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    for dry_run in (False, True):
        with pytest.raises(FailedPrecondition, match="ekiben builds gc") as refused:
            await offline_caches.prune(tmp_path, dry_run=dry_run)
        assert refused.value.reason == "CACHE_OF_SERVER"
    with pytest.raises(FailedPrecondition, match="another folder"):
        async with offline_caches.used(tmp_path, print):
            pass
    assert await asyncio.to_thread(offline_caches.main, [str(tmp_path)]) == 1
    assert "is the folder of a server's builder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environments", what] and old.is_dir()


async def test_the_settings_of_servers_say_how_long_things_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, days in {"bytecode/old": 40, "bytecode/young": 20, "logs/old.log": 20}.items():
        path = tmp_path / name
        path.mkdir(parents=True)
        os.utime(path, (then := time.time() - days * DAY_S, then))

    async def goes() -> dict[Kind, int]:
        return dict((await offline_caches.prune(tmp_path, dry_run=True)).counts)

    monkeypatch.setenv("EKIBEN_BUILDER_UNKNOWN", "what the cache does not read")
    assert await goes() == {Kind.BYTECODE: 1}
    monkeypatch.setenv("EKIBEN_BUILDER_CACHES_KEEP_DAYS", "10")
    monkeypatch.setenv("EKIBEN_BUILDER_LOGS_KEEP_DAYS", "15")
    assert await goes() == {Kind.BYTECODE: 2, Kind.LOGS: 1}
    monkeypatch.setenv("EKIBEN_BUILDER_CACHES_KEEP_DAYS", "50")
    monkeypatch.setenv("EKIBEN_BUILDER_LOGS_KEEP_DAYS", "")
    assert await goes() == {}
    monkeypatch.setenv("EKIBEN_BUILDER_LOCKS_KEEP_DAYS", "for ever")
    with pytest.raises(SettingsError, match="EKIBEN_BUILDER_LOCKS_KEEP_DAYS"):
        await goes()
    said: list[str] = []
    await offline_caches.prune_daily(tmp_path, said.append)
    assert len(said) == 1 and "EKIBEN_BUILDER_LOCKS_KEEP_DAYS" in said[0]


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
