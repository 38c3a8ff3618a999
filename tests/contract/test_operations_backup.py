"""Backup and restore: of rows and bytes, between kinds of database, while others write, killed in the middle."""

import gzip
import hashlib
import json
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import Aborted, DataLoss, EkibenError, FailedPrecondition, Unavailable
from services.content.digest import Digest
from services.kernel.clock import ManualClock
from services.kernel.db import open_database
from services.operations import backup, copies
from services.operations.backup import back_up, prune, read_snapshot, snapshots
from services.operations.installation import Installation
from services.operations.restore import choose, restore, verify
from services.operations.snapshots import blob_path, file_of
from services.operations.store.services import metadata_of
from services.operations.vaults import Vault, open_vault
from services.operations.vaults.folder import FolderVault
from services.registry.app import MIGRATIONS
from services.registry.domain import ContentState, Draft, Kind
from services.registry.identities import SecretItem
from tests.fixtures_operations import ME, Crash, installation_at, opened
from tests.postgres import PostgresServer, running_postgres
from tests.s3 import S3Server


@pytest.fixture
async def vault(tmp_path: Path) -> AsyncIterator[Vault]:
    async with open_vault(str(tmp_path / "vault"), may_make=True) as vault:
        yield vault


@pytest.fixture
async def any_vault(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> AsyncIterator[Vault]:
    """A folder beside SQLite, a bucket beside PostgreSQL."""
    where = str(tmp_path / "vault")
    if "postgresql" in database_url:
        server: S3Server = request.getfixturevalue("s3")
        where = server.new_url()
    async with open_vault(where, may_make=True) as vault:
        yield vault


@pytest.fixture
def source(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Installation:
    """SQLite and files, or PostgreSQL and S3."""
    if "sqlite" in database_url:
        return installation_at(database_url, tmp_path / "source")
    server: S3Server = request.getfixturevalue("s3")
    return installation_at(database_url, tmp_path / "source", server.new_url())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


async def rows_of(installation: Installation) -> dict[str, list[Any]]:
    """Every row of every table, for comparison."""
    found = {}
    async with backup.open_databases(installation) as databases:
        for service, database in databases.items():
            for table in metadata_of(service).sorted_tables:
                async with database.read() as connection:
                    found[table.name] = sorted(map(repr, (await connection.execute(table.select())).all()))
    return found


SENT = {"description": 'é\n"quoted" \u2028', "labels": {"team": "risk", "ключ": "値"}}


async def test_everything_comes_back_also_into_the_other_kind_of_database(
    source: Installation,
    tmp_path: Path,
    manual_clock: ManualClock,
    any_vault: Vault,
    postgres: PostgresServer,
    s3: S3Server,
) -> None:
    item = {"description": "", "kind": 1, "stage": 1, "path": "", "items": [SecretItem("KEY", "", "hidden")]}
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        digest = await registry.push("v1", b"one", **SENT)
        await registry.push("v2", b"one")
        await registry.push("v3", b"three")
        await registry.secrets.create(ME, "s", item)
        made = await back_up(source, any_vault, clock=manual_clock)
    assert (made.blobs.copied, made.snapshot.blob_count, made.snapshot.damaged) == (2, 2, ())
    assert made.snapshot.services["registry"].tables["versions"] == 3
    assert await verify(any_vault, made.snapshot, deep=True) == []
    files = await any_vault.sizes("")
    assert set(files) >= {file_of(made.snapshot.id), blob_path(digest)}
    rows = b"".join([chunk async for chunk in any_vault.read(file_of(made.snapshot.id, "registry.jsonl.gz"))])
    assert b"hidden" not in gzip.decompress(rows)
    targets = [installation_at("sqlite:", tmp_path / "target")]
    if source.databases["registry"].database_url.startswith("sqlite"):
        url = postgres.create(f"test_{os.urandom(6).hex()}")
        targets.append(installation_at(url, tmp_path / "other", s3.new_url()))
    before = await rows_of(source)
    for target in targets:
        assert target.key_file is not None
        folder = target.key_file.parent
        folder.mkdir()
        (folder / "secrets.key").write_bytes((tmp_path / "source" / "secrets.key").read_bytes())
        done = await restore(any_vault, await choose(any_vault), target, clock=manual_clock)
        assert (done.blobs.copied, done.blobs.damaged) == (2, [])
        after = await rows_of(target)
        changed = {name for name in before if before[name] != after[name]} - {"blobs", "collection_holds"}
        assert changed == set()
        async with opened(target, folder, manual_clock) as registry:
            assert set((await registry.check()).values()) == {"READY"}
            first = await registry.catalog.get_version(ME, Kind.MODEL, "m", "v1")
            assert (first.description, dict(first.labels)) == (SENT["description"], SENT["labels"])
            assert first.content.digest == f"sha256:{digest}"
            (secret,) = await registry.secrets.reveal(ME, ["s"])
            assert secret.items[0].value == "hidden"
            # What counts up goes on.
            await registry.push("v4", b"four")
            await registry.delete("v3")
            await registry.collect()
            assert set(await registry.check()) == {"v1", "v2", "v4"}


async def test_a_backup_is_of_one_moment_whatever_goes_on(
    source: Installation, tmp_path: Path, manual_clock: ManualClock, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pushes, deletes and the collector run between any two steps of the backup."""
    wrote = 0
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        for number in range(4):
            await registry.push(f"v{number}", b"%d" % number)
        real = FolderVault.write

        async def write(vault: FolderVault, path: str, chunks: AsyncIterator[bytes]) -> int:
            nonlocal wrote
            wrote += 1
            if wrote <= 6:
                await registry.push(f"new{wrote}", b"new %d" % wrote)
            if path.endswith("blobs.txt.gz"):
                for number in range(4):
                    await registry.delete(f"v{number}")
            await registry.collect(timedelta(minutes=1))
            return await real(vault, path, chunks)

        monkeypatch.setattr(FolderVault, "write", write)
        made = await back_up(source, vault, clock=manual_clock)
        monkeypatch.undo()
        assert made.blobs.damaged == []
        await registry.check()
        await registry.collect()
        assert set(await registry.check()) == {f"new{number}" for number in range(1, 7)}
    target = installation_at("sqlite:", tmp_path / "target")
    await restore(vault, made.snapshot, target, clock=manual_clock)
    async with opened(target, tmp_path / "target", manual_clock) as registry:
        # All that was there when the rows were read, and nothing that came later.
        assert await registry.check() == {f"v{number}": "READY" for number in range(4)}


OTHERS = ("builder", "recorder", "deployer")


@pytest.mark.parametrize("step", range(1, 7))
async def test_a_backup_that_is_killed_leaves_none_and_the_next_goes_on(
    tmp_path: Path, manual_clock: ManualClock, vault: Vault, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    source = installation_at("sqlite:", tmp_path / "source").without(*OTHERS)
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        for number in range(3):
            await registry.push(f"v{number}", b"%d" % number)
        writes = 0
        real = FolderVault.write

        async def write(vault: FolderVault, path: str, chunks: AsyncIterator[bytes]) -> int:
            nonlocal writes
            writes += 1
            if writes == step:
                raise Crash
            return await real(vault, path, chunks)

        async def forgets(*_: object) -> None:
            raise Crash  # a process that is killed releases nothing

        monkeypatch.setattr(FolderVault, "write", write)
        monkeypatch.setattr(backup.held, "release", forgets)
        # The rows, which blobs, three blobs, and the file that makes it a snapshot.
        with pytest.raises(Crash):
            await back_up(source, vault, clock=manual_clock)
        monkeypatch.undo()
        assert await snapshots(vault) == []
        with pytest.raises(FailedPrecondition, match="no complete snapshot"):
            await choose(vault)
        # The hold of the killed one stands, then ends by itself.
        await registry.delete("v2")
        await registry.collect()
        made = await back_up(source, vault, clock=manual_clock)
        assert made.snapshot.blob_count == 2
        assert made.blobs.there + made.blobs.copied == 2
        manual_clock.jump(timedelta(minutes=20))
        await registry.collect()
        assert len([blob async for blob in registry.blobs.blobs()]) == 2
    assert await verify(vault, made.snapshot, deep=True) == []
    await prune(vault, 1)
    assert await snapshots(vault) == [made.snapshot.id]
    named = {file_of(made.snapshot.id, name) for name in ("registry.jsonl.gz", "blobs.txt.gz", "snapshot.json")}
    kept = files(tmp_path / "vault")
    assert named <= kept and len([path for path in kept if path.startswith("blobs/")]) == 2
    assert len(kept) == 5


async def test_only_new_blobs_are_copied_and_old_snapshots_are_pruned(
    tmp_path: Path, manual_clock: ManualClock, vault: Vault
) -> None:
    source = installation_at("sqlite:", tmp_path / "source")
    made = []
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        for number in range(3):
            await registry.push(f"v{number}", b"%d" % number)
            made.append(await back_up(source, vault, clock=manual_clock))
            manual_clock.jump(timedelta(seconds=5))
            if number == 1:
                await registry.delete("v0")
    assert [(m.blobs.copied, m.blobs.there) for m in made] == [(1, 0), (1, 1), (1, 1)]
    gone, deleted = await prune(vault, 1)
    assert gone == [m.snapshot.id for m in made[:2]]
    assert deleted == 1
    assert await verify(vault, await choose(vault), deep=True) == []
    with pytest.raises(FailedPrecondition, match="It has"):
        await choose(vault, made[0].snapshot.id)


async def test_bytes_that_are_damaged_already_are_told_and_the_rest_is_kept(
    tmp_path: Path, manual_clock: ManualClock, vault: Vault
) -> None:
    source, target = (installation_at("sqlite:", tmp_path / name) for name in ("source", "target"))
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        bad, gone, good = [await registry.push(f"v{number}", b"%d" % number) for number in range(3)]
        path = registry.blobs.path(Digest(bad))
        assert path is not None
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        await registry.blobs.delete(Digest(gone))
        made = await back_up(source, vault, clock=manual_clock)
    assert made.snapshot.damaged == tuple(sorted([bad, gone]))
    assert await verify(vault, made.snapshot) == sorted([bad, gone])
    done = await restore(vault, made.snapshot, target, clock=manual_clock)
    assert sorted(done.blobs.damaged) == sorted([bad, gone])
    async with opened(target, tmp_path / "target", manual_clock) as registry:
        assert [blob.digest.hex async for blob in registry.blobs.blobs()] == [good]


async def test_what_was_on_its_way_is_not_restored(tmp_path: Path, manual_clock: ManualClock, vault: Vault) -> None:
    source, target = (installation_at("sqlite:", tmp_path / name) for name in ("source", "target"))
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        await registry.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await registry.uploads.create(ME, "modelRepositories/m/models/v1", "", None)
        made = await back_up(source, vault, clock=manual_clock)
    await restore(vault, made.snapshot, target, clock=manual_clock)
    async with opened(target, tmp_path / "target", manual_clock) as registry:
        version = await registry.catalog.get_version(ME, Kind.MODEL, "m", "v1")
        assert version.content.state is ContentState.FAILED and "Push again" in version.content.failure
        assert not version.content.open_upload


async def test_a_restore_that_is_killed_is_done_again(
    database_url: str, tmp_path: Path, manual_clock: ManualClock, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = installation_at("sqlite:", tmp_path / "source").without("builder", "recorder")
    target = installation_at(database_url, tmp_path / "target").without("builder", "recorder")
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        for number in range(3):
            await registry.push(f"v{number}", b"%d" % number)
        made = await back_up(source, vault, clock=manual_clock)
    real_put, real_read = copies.put, restore.__globals__["read_rows"]
    for step in range(1, 6):  # three blobs, two services
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                raise Crash

        async def put(*args: Any) -> bool:
            count()
            return await real_put(*args)

        async def read_rows(*args: Any) -> dict[str, int]:
            done = await real_read(*args)
            count()  # before the commit
            return done

        monkeypatch.setattr(copies, "put", put)
        monkeypatch.setitem(restore.__globals__, "read_rows", read_rows)
        try:
            await restore(vault, made.snapshot, target, overwrite=True, clock=manual_clock)
        except Crash:
            async with backup.open_databases(target) as databases, databases["registry"].read() as connection:
                assert not await connection.run_sync(lambda sync: "versions" in _tables(sync))
        monkeypatch.undo()
    await restore(vault, made.snapshot, target, overwrite=True, clock=manual_clock)
    with pytest.raises(FailedPrecondition) as refused:
        await restore(vault, made.snapshot, target, clock=manual_clock)
    assert refused.value.reason == "RESTORE_NOT_EMPTY"
    async with opened(target, tmp_path / "target", manual_clock) as registry:
        assert set((await registry.check()).values()) == {"READY"}
        await registry.push("v9", b"nine")


def _tables(sync: Any) -> list[str]:
    import sqlalchemy as sa

    return sa.inspect(sync).get_table_names()


async def test_a_restore_is_refused_while_somebody_uses_the_target(
    source: Installation, tmp_path: Path, manual_clock: ManualClock, vault: Vault
) -> None:
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        await registry.push("v1", b"one")
        made = await back_up(source, vault, clock=manual_clock)
        with pytest.raises(FailedPrecondition) as refused:
            await restore(vault, made.snapshot, source, overwrite=True, clock=manual_clock)
        assert refused.value.reason == ("BLOBS_IN_USE" if source.blobs[:4] == "file" else "INSTALLATION_RUNS")
        assert await registry.check() == {"v1": "READY"}


async def test_a_damaged_backup_changes_nothing(tmp_path: Path, manual_clock: ManualClock, vault: Vault) -> None:
    source, target = (installation_at("sqlite:", tmp_path / name) for name in ("source", "target"))
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        digest = await registry.push("v1", b"one")
        made = await back_up(source, vault, clock=manual_clock)
    root = tmp_path / "vault"
    path = root / file_of(made.snapshot.id, "registry.jsonl.gz")
    good = path.read_bytes()
    for bad in (good[:-4], b"", b"nonsense", gzip.compress(gzip.decompress(good).replace(b"v1", b"v2"))):
        path.write_bytes(bad)
        with pytest.raises(DataLoss) as damaged:
            await restore(vault, made.snapshot, target, clock=manual_clock)
        assert damaged.value.reason == "BACKUP_DAMAGED"
        assert not (tmp_path / "target" / "registry.db").exists()
    path.write_bytes(good)
    (root / blob_path(digest)).write_bytes(b"x" * (root / blob_path(digest)).stat().st_size)
    assert await verify(vault, made.snapshot, deep=True) == [digest]
    done = await restore(vault, made.snapshot, target, clock=manual_clock)
    assert done.blobs.damaged == [digest]
    manifest = root / file_of(made.snapshot.id)
    newer = json.loads(manifest.read_text()) | {"format": 99}
    manifest.write_text(json.dumps(newer))
    with pytest.raises(FailedPrecondition, match="newer release"):
        await read_snapshot(vault, made.snapshot.id)
    manifest.write_text("{}")
    with pytest.raises(DataLoss, match="is damaged"):
        await read_snapshot(vault, made.snapshot.id)


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_lost_hold_is_told(
    tmp_path: Path, manual_clock: ManualClock, vault: Vault, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    source = installation_at("sqlite:", tmp_path / "source")
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        await registry.push("v1", b"one")
        real = FolderVault.write

        async def write(vault: FolderVault, path: str, chunks: AsyncIterator[bytes]) -> int:
            if path.endswith("blobs.txt.gz"):
                await registry.delete("v1")
                if ahead:
                    registry.collector._clock = ManualClock()
                    registry.collector._clock.jump(timedelta(hours=1))
                else:
                    manual_clock.jump(timedelta(hours=1))  # the machine slept
                for _ in range(2):
                    await registry.collector.collect()
            return await real(vault, path, chunks)

        monkeypatch.setattr(FolderVault, "write", write)
        with pytest.raises(Aborted, match="Run the backup again"):
            await back_up(source, vault, clock=manual_clock)
        monkeypatch.undo()
        assert await snapshots(vault) == []
        assert (await back_up(source, vault, clock=manual_clock)).snapshot.damaged == ()


async def test_tables_of_another_release_are_not_backed_up(tmp_path: Path, vault: Vault) -> None:
    source = installation_at("sqlite:", tmp_path / "source")
    (tmp_path / "source").mkdir()
    with pytest.raises(EkibenError, match="Start it once") as refused:
        await back_up(source, vault)
    assert refused.value.reason == "BACKUP_REVISION"


async def test_rows_of_an_older_release_are_brought_forward(
    tmp_path: Path, manual_clock: ManualClock, vault: Vault
) -> None:
    from services.operations.rows import Packer, write_rows
    from services.operations.store import moving
    from services.registry.store.tables import collection_holds, metadata

    source, target = (installation_at("sqlite:", tmp_path / name).without(*OTHERS) for name in ("source", "target"))
    async with opened(source, tmp_path / "source", manual_clock) as registry:
        await registry.push("v1", b"one")
        made = await back_up(source, vault, clock=manual_clock)
    # The same, as a release that had the first revision only would have written it.
    path = tmp_path / "vault" / file_of(made.snapshot.id, "registry.jsonl.gz")
    lines = gzip.decompress(path.read_bytes()).replace(b'"revision":"', b'"revision":"0001","was":"').splitlines(True)
    async with open_database(f"sqlite:///{tmp_path}/old.db") as old, old.transaction() as connection:
        await old.upgrade(connection, MIGRATIONS, "0001")
        tables = await moving.tables_there(connection)
    kept, skipping = [], False
    columns: list[int] | None = None
    for line in lines:
        read = json.loads(line)
        if isinstance(read, dict) and "table" in read:
            skipping = read["table"] not in tables
            names = tables.get(read["table"], [])
            columns = [place for place, name in enumerate(read["columns"]) if name in names]
            line = (
                json.dumps({"table": read["table"], "columns": [read["columns"][place] for place in columns]}).encode()
                + b"\n"
            )
        elif isinstance(read, list):
            assert columns is not None
            line = json.dumps([read[place] for place in columns]).encode() + b"\n"
        if not skipping or (isinstance(read, dict) and "end" in read):
            kept.append(line)
    data = gzip.compress(b"".join(kept))
    path.write_bytes(data)
    manifest = tmp_path / "vault" / file_of(made.snapshot.id)
    read = json.loads(manifest.read_text())
    rows = read["services"]["registry"]
    rows |= {"revision": "0001", "sha256": hashlib.sha256(data).hexdigest()}
    rows["tables"] = {name: count for name, count in rows["tables"].items() if name in tables}
    manifest.write_text(json.dumps(read))
    (tmp_path / "target").mkdir()
    await restore(vault, await choose(vault), target, clock=manual_clock)
    async with opened(target, tmp_path / "target", manual_clock) as registry:
        assert await registry.check() == {"v1": "READY"}
        assert await registry.database.schema_differences(MIGRATIONS, metadata) == []
    assert collection_holds is not None and Packer and write_rows


async def test_a_postgresql_that_restarts_ends_a_backup_and_the_next_is_whole(
    tmp_path: Path, manual_clock: ManualClock, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_postgres() as server:
        source = installation_at(server.create("one"), tmp_path / "source").without(*OTHERS)
        async with opened(source, tmp_path / "source", manual_clock) as registry:
            await registry.push("v1", b"one")
            real, restarts = FolderVault.write, []

            async def write(vault: FolderVault, path: str, chunks: AsyncIterator[bytes]) -> int:
                if not restarts:
                    restarts.append(path)
                    server.restart()
                return await real(vault, path, chunks)

            monkeypatch.setattr(FolderVault, "write", write)
            with pytest.raises(Unavailable):
                await back_up(source, vault, clock=manual_clock)
            assert await snapshots(vault) == []
            made = await back_up(source, vault, clock=manual_clock)
    assert (made.snapshot.blob_count, await verify(vault, made.snapshot, deep=True)) == (1, [])
