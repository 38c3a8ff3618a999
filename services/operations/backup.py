"""A backup of an installation that runs on: rows of one moment, then the bytes that they name.

1. A hold keeps the collector from every blob that is named. It ends by itself, should this process be killed.
2. The rows of all services are written as they are at one moment (`store/moments.py`).
3. The blobs that these rows name are copied, those which the vault has left out. Bytes that are pushed meanwhile are
   the next backup's.
4. `snapshot.json` is written: now it is a backup. Killed before, it is none, and what was copied is found by the next.

Rows first, since blobs never change and only the rows say which ones count. Bytes first would need another pass for
what was pushed meanwhile, and the same hold.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ekiben.errors import Aborted, EkibenError, FailedPrecondition
from services.content import open_blobs_to_read
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import Database, open_database
from services.kernel.settings import DatabaseSettings
from services.operations import copies
from services.operations.copies import Copied
from services.operations.installation import Installation
from services.operations.rows import Packer, unpacked, write_rows
from services.operations.snapshots import BLOBS_FILE, Rows, Snapshot, file_of, new_id
from services.operations.store.moments import one_moment
from services.operations.store.services import package_of
from services.operations.vaults import Vault
from services.registry.store import blobs as held
from services.registry.store import secrets as secret_rows

log = logging.getLogger(__name__)

_HOLD = timedelta(minutes=15)
_RENEW_S = 60.0

Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Made:
    """A snapshot that was made, and how its blobs were had."""

    snapshot: Snapshot
    blobs: Copied


@asynccontextmanager
async def open_databases(installation: Installation) -> AsyncIterator[dict[str, Database]]:
    """The database of each service; one for all that share its settings."""
    async with AsyncExitStack() as stack:
        opened: dict[DatabaseSettings, Database] = {}
        for settings in installation.databases.values():
            if settings not in opened:
                opened[settings] = await stack.enter_async_context(open_database(settings))
        yield {service: opened[settings] for service, settings in installation.databases.items()}


async def back_up(
    installation: Installation,
    vault: Vault,
    *,
    clock: Clock = SYSTEM,
    say: Say = _silent,
    progress: copies.Progress = copies.no_progress,
) -> Made:
    """Make a snapshot in a vault, while the services run or not.

    Bytes that are missing or damaged already are told in the result, and the rest is backed up.

    Raises:
        FailedPrecondition: the tables of a service are not those of this release (BACKUP_REVISION).
        Aborted: the hold on the collector was lost meanwhile, and bytes with it (HOLD_LOST).
        Unavailable, ResourceExhausted: a database is away; the vault is full.
    """
    now = clock.now()
    snapshot_id = new_id(now, secrets.token_hex(3))
    async with open_databases(installation) as databases:
        revisions = {service: await _revision(service, database) for service, database in databases.items()}
        registry = databases.get("registry")
        async with _holding(registry, snapshot_id, clock) as hold:
            services: dict[str, Rows] = {}
            blobs_sha256 = ""
            key_ids: tuple[str, ...] = ()
            async with one_moment(databases) as connections:
                for service, connection in connections.items():
                    say(f"Writing the rows of the {service}")
                    packer, counts = Packer(), dict[str, int]()
                    lines = write_rows(connection, service, revisions[service], counts)
                    await vault.write(file_of(snapshot_id, f"{service}.jsonl.gz"), packer.packed(lines))
                    services[service] = Rows(revisions[service], counts, packer.sha256)
                total = _Total()
                if registry is not None:
                    packer = Packer()
                    lines = _blob_lines(held.named(connections["registry"]), total)
                    await vault.write(file_of(snapshot_id, BLOBS_FILE), packer.packed(lines))
                    blobs_sha256 = packer.sha256
                    key_ids = tuple(sorted(await secret_rows.key_ids(connections["registry"])))
            copied = Copied()
            if registry is not None:
                say(f"Copying {total.count:,} blobs")
                async with open_blobs_to_read(installation.blobs) as blobs:
                    wanted = blobs_of(vault, snapshot_id, blobs_sha256)
                    copied = await copies.to_vault(blobs, vault, wanted, progress)
                async with registry.read() as connection:
                    left = await held.still_named(connection, [f"sha256:{digest}" for digest in copied.damaged])
                if len(left) < len(copied.damaged):
                    hold.lost = "the registry's clock is ahead of this one's"
                hold.check(clock.now())
            snapshot = Snapshot(
                id=snapshot_id,
                create_time=now.isoformat(),
                release=importlib.metadata.version("ekiben"),
                services=services,
                blob_count=total.count,
                blob_bytes=total.size_bytes,
                blobs_sha256=blobs_sha256,
                damaged=tuple(sorted(copied.damaged)),
                key_ids=key_ids,
            )
            await vault.write(file_of(snapshot_id), _whole(snapshot.to_json()))
    return Made(snapshot, copied)


async def blobs_of(vault: Vault, snapshot: str, sha256: str) -> AsyncIterator[tuple[str, int]]:
    """Hex digests and sizes of the blobs of a snapshot, in order. Raises DataLoss (BACKUP_DAMAGED)."""
    path = file_of(snapshot, BLOBS_FILE)
    async for line in unpacked(vault.read(path), path, sha256):
        digest, _, size = line.decode().partition(" ")
        yield digest, int(size)


async def snapshots(vault: Vault) -> list[str]:
    """Ids of the snapshots of a vault that are complete, oldest first."""
    return sorted(path.split("/")[1] for path in await vault.sizes("snapshots") if path.endswith("/snapshot.json"))


async def read_snapshot(vault: Vault, snapshot: str) -> Snapshot:
    """What a snapshot says of itself. Raises NotFound, DataLoss (BACKUP_DAMAGED), FailedPrecondition (BACKUP_NEWER)."""
    path = file_of(snapshot)
    text = b"".join([chunk async for chunk in vault.read(path)])
    return Snapshot.from_json(text, path)


async def prune(vault: Vault, keep: int) -> tuple[list[str], int]:
    """Delete all but the newest `keep` snapshots, halves of killed ones, and the blobs that none names any more.

    Returns the ids of the snapshots and the number of blobs that went. Each snapshot's own file goes first: killed in
    its middle, it leaves what the next one deletes.
    """
    complete = await snapshots(vault)
    kept = complete[-keep:] if keep else []
    files = await vault.sizes("snapshots")
    gone = sorted({path.split("/")[1] for path in files} - set(kept))
    for snapshot in gone:
        await vault.delete(file_of(snapshot))
        for path in files:
            if path.startswith(f"snapshots/{snapshot}/"):
                await vault.delete(path)
    named: set[str] = set()
    for snapshot in kept:
        read = await read_snapshot(vault, snapshot)
        if read.blobs_sha256:
            named.update([digest async for digest, _ in blobs_of(vault, snapshot, read.blobs_sha256)])
    deleted = 0
    for shard in range(256):
        for path in await vault.sizes(f"blobs/sha256/{shard:02x}"):
            if path.rpartition("/")[2] not in named:
                await vault.delete(path)
                deleted += 1
    return gone, deleted


@dataclass
class _Hold:
    """A hold that is renewed; `check` raises when it was lost in between."""

    until: datetime
    lost: str = ""

    def check(self, now: datetime) -> None:
        """Raises Aborted (HOLD_LOST)."""
        if now >= self.until:
            self.lost = self.lost or "this process slept"
        if self.lost:
            raise Aborted(
                f"The hold that keeps blobs from the collector was lost meanwhile: {self.lost}. Run the backup again; "
                "what is copied already is not copied twice.",
                reason="HOLD_LOST",
            )


@asynccontextmanager
async def _holding(registry: Database | None, name: str, clock: Clock) -> AsyncIterator[_Hold]:
    if registry is None:
        yield _Hold(datetime.max.replace(tzinfo=UTC))
        return
    hold = _Hold(await _renew(registry, name, clock))

    async def renewing() -> None:
        while True:
            await clock.sleep(_RENEW_S)
            try:
                if clock.now() >= hold.until:
                    hold.lost = "this process slept"
                hold.until = await _renew(registry, name, clock)
            except EkibenError as exc:
                log.warning("the hold could not be renewed", extra={"error": exc.message})

    task = asyncio.ensure_future(renewing())
    try:
        yield hold
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        with contextlib.suppress(EkibenError):
            async with registry.transaction() as connection:
                await held.release(connection, name)


async def _renew(registry: Database, name: str, clock: Clock) -> datetime:
    now = clock.now()
    async with registry.transaction() as connection:
        await held.hold(connection, name, "a backup", now, now + _HOLD)
    return now + _HOLD


async def _revision(service: str, database: Database) -> str:
    current, head = await database.revision(package_of(service))
    if current != head:
        raise FailedPrecondition(
            f"The tables of the {service} are at revision {current or 'none'}, and this release has {head}. "
            + ("Start it once, or back up with the release that it runs." if current else "Start it once."),
            reason="BACKUP_REVISION",
            service=service,
            revision=current or "",
        )
    return head


@dataclass
class _Total:
    count: int = 0
    size_bytes: int = 0


async def _blob_lines(found: AsyncIterator[tuple[str, int]], total: _Total) -> AsyncIterator[bytes]:
    async for digest, size in found:
        total.count += 1
        total.size_bytes += size
        yield f"{digest.removeprefix('sha256:')} {size}\n".encode()


async def _whole(data: bytes) -> AsyncIterator[bytes]:
    yield data
