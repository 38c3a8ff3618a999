"""An installation out of a backup: bytes first, then the rows that name them, the registry's last.

1. The snapshot's files are read through and verified; nothing is touched before that.
2. The blobs go into the blob store, each verified, those that are there left out.
3. The rows of each service go into its database in one transaction: made at the revision of the backup, filled, brought
   to this release's revision. Killed in between, a service has its rows or has none; restore again with `overwrite`.

What was on its way when the backup was made is not in it: open uploads end, their versions wait for another push.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ekiben.errors import DataLoss, FailedPrecondition
from services.content import open_blobs
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import Database
from services.operations import copies
from services.operations.backup import blobs_of, open_databases, read_snapshot, snapshots
from services.operations.copies import Copied
from services.operations.installation import Installation
from services.operations.rows import read_rows, unpacked
from services.operations.snapshots import Snapshot, file_of
from services.operations.store.moving import occupied, others
from services.operations.store.settling import settle_registry
from services.operations.vaults import Vault

log = logging.getLogger(__name__)

Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Restored:
    """What was restored, and how its blobs were had."""

    snapshot: Snapshot
    blobs: Copied


async def choose(vault: Vault, snapshot: str = "") -> Snapshot:
    """The snapshot of this id, or the newest.

    Raises:
        FailedPrecondition: the vault has none, or none of this id (SNAPSHOT_NOT_FOUND).
    """
    there = await snapshots(vault)
    if not there or (snapshot and snapshot not in there):
        told = f"There is no snapshot {snapshot!r} in the vault" if snapshot else "The vault has no complete snapshot"
        raise FailedPrecondition(
            f"{told}. " + (f"It has {', '.join(there[-5:])}." if there else "Make one with `ekiben admin backup`."),
            reason="SNAPSHOT_NOT_FOUND",
            snapshot=snapshot,
        )
    return await read_snapshot(vault, snapshot or there[-1])


async def verify(vault: Vault, snapshot: Snapshot, *, deep: bool = False) -> list[str]:
    """Read a snapshot through: every file of rows, and that each blob is there (`deep`: that it is what it was).

    Returns the digests of blobs that are missing or damaged.

    Raises:
        DataLoss: a file of rows is damaged (BACKUP_DAMAGED).
        NotFound: one is missing (BACKUP_FILE_MISSING).
    """
    for service, rows in snapshot.services.items():
        path = file_of(snapshot.id, f"{service}.jsonl.gz")
        async for _ in unpacked(vault.read(path), path, rows.sha256):
            pass
    if not snapshot.blobs_sha256:
        return []
    async for _ in blobs_of(vault, snapshot.id, snapshot.blobs_sha256):
        pass
    return await copies.verify(vault, blobs_of(vault, snapshot.id, snapshot.blobs_sha256), deep=deep)


async def restore(
    vault: Vault,
    snapshot: Snapshot,
    installation: Installation,
    *,
    overwrite: bool = False,
    clock: Clock = SYSTEM,
    say: Say = _silent,
    progress: copies.Progress = copies.no_progress,
) -> Restored:
    """Put a snapshot into an installation that does not run and is empty, or is emptied if `overwrite`.

    Blobs that the backup lacks are told in the result; their versions are restored without their bytes.

    Raises:
        FailedPrecondition: a database has rows (RESTORE_NOT_EMPTY); somebody uses it (INSTALLATION_RUNS) or the blobs
            (BLOBS_IN_USE); a newer release made the backup (DATABASE_NEWER).
        DataLoss, NotFound: see `verify`; nothing was changed.
    """
    installation = installation.without(*(set(installation.databases) - set(snapshot.services)))
    say(f"Verifying snapshot {snapshot.id}")
    await verify(vault, snapshot)
    async with open_databases(installation) as databases:
        await _must_be_free(databases, overwrite=overwrite)
        copied = Copied()
        if "registry" in databases:
            async with open_blobs(installation.blobs) as blobs:
                say(f"Copying {snapshot.blob_count:,} blobs")
                wanted = blobs_of(vault, snapshot.id, snapshot.blobs_sha256)
                copied = await copies.from_vault(vault, blobs, wanted, progress)
                await _load(vault, snapshot, databases, clock, say)
        else:
            await _load(vault, snapshot, databases, clock, say)
    return Restored(snapshot, copied)


async def _load(vault: Vault, snapshot: Snapshot, databases: Mapping[str, Database], clock: Clock, say: Say) -> None:
    # `databases` has the registry last: its rows make the rest visible.
    for service, database in databases.items():
        say(f"Writing the rows of the {service}")
        rows = snapshot.services[service]
        path = file_of(snapshot.id, f"{service}.jsonl.gz")
        async with database.transaction() as connection:
            lines = unpacked(vault.read(path), path, rows.sha256)
            counts = await read_rows(database, connection, lines, service, rows.revision, path)
            if counts != dict(rows.tables):
                raise DataLoss(
                    f"{path} of the backup is damaged: other numbers of rows than snapshot.json says. Restore another "
                    "snapshot.",
                    reason="BACKUP_DAMAGED",
                    path=path,
                )
            if service == "registry":
                await settle_registry(connection, clock.now())


async def _must_be_free(databases: Mapping[str, Database], *, overwrite: bool) -> None:
    async with AsyncExitStack() as stack:
        connections = {}
        for database in dict.fromkeys(databases.values()):
            connections[database] = await stack.enter_async_context(database.transaction())
        if connected := await others(list(connections.values())):
            raise FailedPrecondition(
                f"Somebody uses the databases: {len(connected)} connections of {', '.join(sorted(set(connected)))}. "
                "Stop the services first.",
                reason="INSTALLATION_RUNS",
            )
        for service, database in databases.items():
            table = await occupied(connections[database], service)
            if table and not overwrite:
                raise FailedPrecondition(
                    f"The database of the {service} is not empty: {table} has rows. Restore into an empty one, or say "
                    "--overwrite to give up what it holds.",
                    reason="RESTORE_NOT_EMPTY",
                    service=service,
                    table=table,
                )
