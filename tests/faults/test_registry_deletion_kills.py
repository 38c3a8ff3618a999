"""The registry killed between any two steps of a delete, a restore and a purge: all of it happened, or none."""

import asyncio
import contextlib
import hashlib
import json
import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import EkibenError
from services.kernel.clock import ManualClock
from services.registry.aliases import Aliases
from services.registry.domain import ContentState, Draft, Kind, Use
from services.registry.lineage import Lineage
from services.registry.store import catalog as catalog_rows
from services.registry.store import deletions as rows
from services.registry.store import uses as use_rows
from tests.registry_crashes import (
    ME,
    NAME,
    ONE,
    TWO,
    Crash,
    Parts,
    failpoint,
    no_name_dangles,
    only_named_blobs_are_left,
    opened,
    read,
    send,
)

WEEK = timedelta(days=7)
DIGEST = f"sha256:{hashlib.sha256(ONE).hexdigest()}"


async def deleted_uids(parts: Parts) -> list[str]:
    found, _ = await parts.deletions.list(ME, "", 100, None)
    return [one.uid for one in found]


async def exactly_one_has_it(parts: Parts) -> bool:
    """Whether v1 is there; it is deleted otherwise, never both and never neither."""
    gone = len(await deleted_uids(parts))
    there = (await parts.catalog.list_versions(ME, Kind.MODEL, None, "label:team=risk", 10, None)).total
    assert gone + there == 1
    if there:
        assert (await read(parts, "v1")).content.digest == DIGEST
    await no_name_dangles(parts)
    return bool(there)


def once_on_postgresql(database_url: str, *, before: bool) -> None:
    """Each step is within one transaction: before it or after it is the same to the database."""
    if before and "postgresql" in database_url:
        pytest.skip("the rows go the same way as after the step")


DELETE = [(rows, "keep_versions"), (rows, "delete_versions"), (rows, "keep_repository")]
RESTORE = [
    (rows, "version"),
    (rows, "restore_repository"),
    (rows, "restore_version"),
    (rows, "set_labels"),
    (catalog_rows, "lock_repository"),
]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", DELETE + RESTORE, ids=lambda step: step[1])
async def test_a_delete_or_a_restore_that_is_killed_at_any_step(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str],
    before: bool,
) -> None:
    once_on_postgresql(database_url, before=before)
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft(labels={"team": "risk"}))
        await send(parts, "v1", ONE)
        deleting = step in DELETE
        if not deleting:
            await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)
        failpoint(monkeypatch, *step, before=before)
        with pytest.raises(Crash):
            if deleting:
                await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)
            else:
                await parts.deletions.undelete(ME, (await deleted_uids(parts))[0])
    monkeypatch.undo()
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        assert await exactly_one_has_it(parts) is deleting
        manual_clock.jump(timedelta(minutes=20))
        await parts.collector.collect()
        if deleting:
            await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)
        assert not await exactly_one_has_it(parts)
        await parts.collector.collect()
        await parts.deletions.undelete(ME, (await deleted_uids(parts))[0])
        assert await exactly_one_has_it(parts)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", ["expired", "purge", "forget_repositories"])
async def test_a_purge_that_is_killed_at_any_step(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    before: bool,
) -> None:
    once_on_postgresql(database_url, before=before)
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft(labels={"team": "risk"}))
        await send(parts, "v1", ONE)
        await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)
        manual_clock.jump(WEEK - timedelta(seconds=1))
        await parts.collector.collect()
        assert len(await deleted_uids(parts)) == 1
        manual_clock.jump(timedelta(seconds=1))
        failpoint(monkeypatch, rows, step, before=before)
        with pytest.raises(Crash):
            await parts.collector.collect()
    monkeypatch.undo()
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        assert await deleted_uids(parts) == []
        await only_named_blobs_are_left(parts)
        assert [blob async for blob in parts.blobs.blobs()] == []


async def test_an_upload_that_completes_while_its_version_is_deleted(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    """Either it completed first, and its content comes back too, or it is refused."""
    for seed in range(4):
        async with opened(database_url, tmp_path / str(seed), manual_clock, delete_grace=WEEK) as parts:
            name = f"v{seed}"
            await parts.catalog.create_version(ME, Kind.MODEL, "m", name, Draft())

            async def delete(seed: int = seed) -> None:
                for _ in range(seed * 40):
                    await asyncio.sleep(0)
                await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)

            sent, _ = await asyncio.gather(send(parts, name, ONE), delete(), return_exceptions=True)
            await parts.deletions.undelete(ME, (await deleted_uids(parts))[0])
            content = (await read(parts, name)).content
            assert (content.state is ContentState.READY) is (sent is None), sent
            assert content.state in (ContentState.READY, ContentState.PENDING, ContentState.FAILED)
            await no_name_dangles(parts)
            await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)


async def test_deletes_restores_purges_and_collectors_at_once(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    chance = random.Random(7)
    async with opened(database_url, tmp_path, manual_clock, delete_grace=timedelta(minutes=5)) as parts:
        for number in range(3):
            await parts.catalog.create_version(ME, Kind.MODEL, "m", f"v{number}", Draft())

        async def push() -> None:
            await send(parts, f"v{chance.randrange(3)}", chance.choice([ONE, TWO]))

        async def delete() -> None:
            await parts.catalog.delete_version(ME, Kind.MODEL, "m", f"v{chance.randrange(3)}", "")

        async def undelete() -> None:
            if uids := await deleted_uids(parts):
                await parts.deletions.undelete(ME, chance.choice(uids))

        async def collect() -> None:
            manual_clock.jump(timedelta(seconds=61))
            await parts.collector.collect()

        async def work(choices: list[Any]) -> None:
            for _ in range(8):
                try:
                    await chance.choice(choices)()
                except EkibenError as exc:
                    allowed = {"CLAIM_LOST", "MODEL_NOT_FOUND", "MODEL_EXISTS", "UPLOAD_NOT_FOUND", "UPLOAD_ENDED"}
                    assert exc.reason in allowed | {
                        "DELETED_VERSION_NOT_FOUND",
                        "UPLOAD_INCOMPLETE",
                        "CONTENT_EXISTS",
                    }, exc
                await asyncio.sleep(0)

        await asyncio.gather(*(work([push, delete, undelete]) for _ in range(3)), work([collect]))
        await no_name_dangles(parts)
        for uid in await deleted_uids(parts):
            try:
                await parts.deletions.undelete(ME, uid)
            except EkibenError as exc:
                assert exc.reason == "MODEL_EXISTS"
                await parts.deletions.purge(ME, uid)
        await only_named_blobs_are_left(parts)


async def test_the_name_is_kept_by_the_newer_version(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await send(parts, "v1", ONE)
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", "v1", "")
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await send(parts, "v1", TWO)
        with pytest.raises(EkibenError) as caught:
            await parts.deletions.undelete(ME, (await deleted_uids(parts))[0])
        assert caught.value.reason == "MODEL_EXISTS"
        assert (await read(parts, "v1")).content.digest == f"sha256:{hashlib.sha256(TWO).hexdigest()}"
        # Sending the deleted content again costs no bytes: it is still there.
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v2", Draft())
        created = await parts.uploads.create(ME, NAME.format("v2"), DIGEST, len(ONE))
        assert created.state == "COMPLETED"


async def test_a_name_that_became_an_alias_is_not_restored(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        for version in ("v1", "stable"):
            await parts.catalog.create_version(ME, Kind.MODEL, "m", version, Draft())
        await send(parts, "v1", ONE)
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", "stable", "")
        aliases = Aliases(parts.database, manual_clock)
        await aliases.set(ME, Kind.MODEL, "m", "stable", "v1", reason="because")
        with pytest.raises(EkibenError) as caught:
            await parts.deletions.undelete(ME, (await deleted_uids(parts))[0])
        assert caught.value.reason == "VERSION_IS_ALIAS"


async def test_of_a_claim_and_a_delete_at_once_one_comes_first(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    """Never is a version gone that somebody was told to have, nor refused to be deleted for a claim that failed."""
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        lineage = Lineage(parts.database, manual_clock)
        outcomes = set()
        for number in range(24):
            version, uid = f"v{number}", f"d{number}"
            await parts.catalog.create_version(ME, Kind.MODEL, "m", version, Draft())
            use = Use(f"deployments/{uid}/revisions/1", f"r{number}", NAME.format(version))

            async def claim(number: int, uid: str = uid, use: Use = use) -> None:
                for _ in range(number % 6):
                    await asyncio.sleep(0)
                await lineage.claim("default", f"deployments/{uid}", uid, 1, [use])

            async def delete(number: int, version: str = version) -> None:
                for _ in range((number + 2) % 5):
                    await asyncio.sleep(0)
                if number % 2:
                    await parts.catalog.delete_version(ME, Kind.MODEL, "m", version, "")
                else:
                    await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)

            claimed, deleted = await asyncio.gather(claim(number), delete(number), return_exceptions=True)
            reasons = [getattr(one, "reason", "done") for one in (claimed, deleted)]
            assert reasons in (["done", "MODEL_IN_USE"], ["MODEL_NOT_FOUND", "done"]), (claimed, deleted)
            outcomes.add(reasons[0])
            if reasons[0] == "done":
                assert (await read(parts, version)).version == version
                await lineage.report("default", f"deployments/{uid}", uid, 1, [], gone=True)
                await parts.catalog.delete_version(ME, Kind.MODEL, "m", version, "")
        assert outcomes <= {"done", "MODEL_NOT_FOUND"}


USES = [(use_rows, "of_owner"), (use_rows, "put"), (use_rows, "end_of"), (use_rows, "live_users")]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", USES, ids=lambda step: step[1])
async def test_uses_are_as_their_bento_is_whatever_is_killed(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str],
    before: bool,
) -> None:
    once_on_postgresql(database_url, before=before)
    bento, model = "bentoRepositories/b/bentos/v1", NAME.format("v1")
    draft = Draft(manifest=json.dumps({"models": ["m:v1"]}))

    async def used(parts: Parts) -> bool:
        graph = await Lineage(parts.database, manual_clock).graph(ME, model, live_only=True)
        return bento in {use.consumer for use in graph.uses}

    async def there(parts: Parts) -> bool:
        return bool((await parts.catalog.list_versions(ME, Kind.BENTO, None, "", 10, None)).items)

    async def create(parts: Parts) -> None:
        await parts.catalog.create_version(ME, Kind.BENTO, "b", "v1", draft)

    async def delete(parts: Parts) -> None:
        await parts.catalog.delete_version(ME, Kind.BENTO, "b", "v1", "")

    async def restore(parts: Parts) -> None:
        await parts.deletions.undelete(ME, (await deleted_uids(parts))[0])

    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        for act in (create, delete, restore):
            with monkeypatch.context() as patch:
                failpoint(patch, *step, before=before)
                with contextlib.suppress(Crash):
                    await act(parts)
            assert await used(parts) is await there(parts)
            with contextlib.suppress(EkibenError, IndexError):
                await act(parts)
            assert await used(parts) is await there(parts) is (act is not delete)
