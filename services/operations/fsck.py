"""Every inconsistency between rows, and between rows and bytes, found and explained; while the services run or not.

Rows are looked at as they are at one moment (`store/moments.py`), so that nothing that is merely under way looks
wrong. Bytes are looked at after that, and whatever seems wrong is looked at once more: what was deleted meanwhile is
no finding. With `repair`, what loses nothing is mended; bytes come back out of a vault.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ekiben.errors import DataLoss, EkibenError, FailedPrecondition, NotFound
from services.content import open_blobs, open_blobs_to_read
from services.content.blobs import BlobReader
from services.content.blobs.checked import read_verified
from services.content.digest import Digest
from services.content.sealing import read_keys
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import Database
from services.operations import copies
from services.operations.backup import open_databases
from services.operations.findings import Finding, Severity
from services.operations.installation import Installation
from services.operations.snapshots import blob_path
from services.operations.store.checks import others, registry, tables
from services.operations.store.moments import one_moment
from services.operations.store.services import package_of
from services.operations.vaults import Vault
from services.registry.store import blobs as held
from services.registry.store import uploads as upload_rows

Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


@dataclass
class Report:
    """What was looked at, and what was found, worst first."""

    findings: list[Finding] = field(default_factory=list)
    services: list[str] = field(default_factory=list)
    blobs: int = 0
    blob_bytes: int = 0

    def count(self, severity: Severity) -> int:
        """How many of a severity are not repaired."""
        return sum(finding.severity is severity and not finding.repaired for finding in self.findings)


async def check(
    installation: Installation,
    *,
    deep: bool = False,
    repair: bool = False,
    source: Vault | None = None,
    clock: Clock = SYSTEM,
    say: Say = _silent,
    progress: copies.Progress = copies.no_progress,
) -> Report:
    """Look at everything.

    Args:
        deep: read and hash every blob, and count what is usually believed.
        repair: mend what loses nothing.
        source: a vault from which a repair takes blobs that are missing or damaged.

    Raises:
        Unavailable: a database or the blob store is away.
    """
    async with AsyncExitStack() as stack:
        databases = await stack.enter_async_context(open_databases(installation))
        blobs = None
        if "registry" in databases:
            blobs = await stack.enter_async_context(open_blobs_to_read(installation.blobs))
        report = await look(databases, blobs, installation.key_file, deep=deep, clock=clock, say=say, progress=progress)
        if repair:
            say("Repairing")
            await _repair(report, installation, source)
    return report


async def look(
    databases: Mapping[str, Database],
    blobs: BlobReader | None,
    key_file: Path | None = None,
    *,
    deep: bool = False,
    schema: bool = True,
    clock: Clock = SYSTEM,
    say: Say = _silent,
    progress: copies.Progress = copies.no_progress,
) -> Report:
    """Look at what is open already, and change nothing; see `check`. `schema`: also at the tables themselves."""
    report = Report()
    good = {}
    for service, database in databases.items():
        if (finding := await _revision(service, database)) is None:
            good[service] = database
        else:
            report.findings.append(finding)
    report.services = list(good)
    named: dict[str, int] = {}
    async with one_moment(good) as moment:
        for service, connection in moment.items():
            say(f"Checking the rows of the {service}")
            if schema:
                report.findings += [f async for f in tables.of_any(connection, service, deep=deep)]
        if "registry" in moment:
            keys = await asyncio.to_thread(_keys, key_file, report)
            found = registry.of_registry(moment["registry"], good["registry"], clock.now(), keys)
            report.findings += [f async for f in found]
            named = {digest: size async for digest, size in held.named(moment["registry"])}
        if "deployer" in moment:
            found = others.of_deployer(moment["deployer"], moment.get("registry"))
            report.findings += [f async for f in found]
        if "builder" in moment:
            report.findings += [f async for f in others.of_builder(moment["builder"])]
        if "recorder" in moment:
            report.findings += [f async for f in others.of_recorder(moment["recorder"], deep=deep)]
    if "registry" in good and blobs is not None:
        say(f"Checking {len(named):,} blobs")
        await _Bytes(good["registry"], blobs, clock, report, progress).check(named, deep=deep)
    order = list(Severity)
    report.findings.sort(key=lambda f: (order.index(f.severity), f.service, f.check, f.resource))
    return report


async def _revision(service: str, database: Database) -> Finding | None:
    current, head = await database.revision(package_of(service))
    if current == head:
        return None
    return Finding(
        "REVISION_DIFFERS",
        Severity.ERROR,
        service,
        "",
        f"Its tables are at revision {current or 'none'}, and this release has {head}: they were not looked at.",
        "Start it once with this release, or check with the release that it runs.",
    )


def _keys(path: Path | None, report: Report) -> list[str] | None:
    if path is None:
        return None
    if not path.exists():
        return []
    try:
        return list(read_keys(path))
    except (FailedPrecondition, OSError) as exc:
        report.findings.append(
            Finding("KEY_FILE_UNREADABLE", Severity.ERROR, "registry", str(path), str(exc), "Put a copy back.")
        )
        return None


class _Bytes:
    """What the blob store holds, against what the rows name."""

    def __init__(
        self, database: Database, blobs: BlobReader, clock: Clock, report: Report, progress: copies.Progress
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._report = report
        self._progress = progress

    async def check(self, named: dict[str, int], *, deep: bool) -> None:
        """Compare; `named` are digests with their sizes."""
        began = self._clock.now()
        strays = 0
        left = dict(named)
        suspects: dict[str, str] = {}
        whole: list[tuple[str, int]] = []
        async for blob in self._blobs.blobs():
            self._report.blobs += 1
            self._report.blob_bytes += blob.size_bytes
            size = left.pop(str(blob.digest), None)
            if size is None:
                strays += str(blob.digest) not in named and blob.modify_time < began
            elif size != blob.size_bytes:
                suspects[str(blob.digest)] = f"has {blob.size_bytes:,} bytes where {size:,} were pushed"
            else:
                whole.append((str(blob.digest), size))
        suspects |= dict.fromkeys(left, "is missing")

        async def read(item: tuple[str, int]) -> None:
            try:
                async for chunk in read_verified(self._blobs, Digest.parse(item[0])):
                    self._progress(0, len(chunk))
            except (DataLoss, NotFound) as exc:
                suspects[item[0]] = "is missing" if isinstance(exc, NotFound) else "holds other bytes than it should"
            self._progress(1, 0)

        if deep:
            await copies.at_once(_each(whole), read)
        await self._tell(suspects)
        for finding in self._report.findings:
            if finding.check == "BLOB_NOT_HELD":
                self._let_hold(finding, suspects)
        await self._unnamed(strays)

    async def _tell(self, suspects: dict[str, str]) -> None:
        """Findings for those blobs that are still named, and still not right."""
        async with self._database.read() as connection:
            still = await held.still_named(connection, sorted(suspects))
            owners = await held.namers(connection, sorted(still))
        for digest in sorted(still):
            why = suspects[digest]
            if why == "is missing":
                with contextlib.suppress(NotFound):
                    await self._blobs.stat(Digest.parse(digest))
                    continue
            check = "BLOB_MISSING" if why == "is missing" else "BLOB_DAMAGED"
            self._report.findings.append(
                Finding(
                    check,
                    Severity.ERROR,
                    "registry",
                    ", ".join(owners.get(digest, [])) or digest,
                    f"Its blob {digest} {why}.",
                    "Push it again with --force, or repair with --from VAULT.",
                    digest,
                )
            )

    def _let_hold(self, finding: Finding, suspects: dict[str, str]) -> None:
        if finding.digest not in suspects:

            async def hold() -> bool:
                return await registry.hold_again(self._database, finding.digest, self._clock.now())

            finding.repair = hold

    async def _unnamed(self, strays: int) -> None:
        if strays:
            self._report.findings.append(
                Finding(
                    "BLOBS_UNNAMED",
                    Severity.NOTE,
                    "registry",
                    "",
                    f"{strays:,} blobs are in the store and named by nothing.",
                    "The collector deletes them once their time is over.",
                )
            )
        uploads = getattr(self._blobs, "uploads", None)
        if uploads is None:
            return
        ids = await uploads()
        async with self._database.read() as connection:
            opened = await upload_rows.still_open(connection, ids)
        if ended := set(ids) - opened:
            self._report.findings.append(
                Finding(
                    "PARTS_LEFT",
                    Severity.NOTE,
                    "registry",
                    "",
                    f"Parts of {len(ended):,} uploads that have ended are left.",
                    "The next round of the collector frees them.",
                )
            )


async def _repair(report: Report, installation: Installation, source: Vault | None) -> None:
    lost = [f for f in report.findings if f.check in ("BLOB_MISSING", "BLOB_DAMAGED")]
    if lost and source is not None:
        async with open_blobs(installation.blobs) as blobs:
            for finding in lost:
                digest = Digest.parse(finding.digest)
                path = blob_path(digest.hex)
                size = (await source.sizes(path.rpartition("/")[0])).get(path)
                if size is not None:
                    finding.repaired = await copies.put(blobs, digest, size, source.read(path))
                if not finding.repaired:
                    finding.then = "The vault does not have it either. Push it again with --force."
    for finding in report.findings:
        if finding.repair is not None:
            try:
                finding.repaired = await finding.repair()
            except EkibenError as exc:
                finding.then = f"The repair failed: {exc.message}"


async def _each(items: list[tuple[str, int]]) -> AsyncIterator[tuple[str, int]]:
    for item in items:
        yield item
