"""`python -m services.operations`: what `ekiben admin backup`, `restore`, `fsck` and the like start."""

import argparse
import contextlib
import errno
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ekiben.cli.output import size
from ekiben.cli.progress import Steps
from ekiben.errors import EkibenError
from services.kernel import endings
from services.kernel.clock import SYSTEM
from services.kernel.db import open_database
from services.kernel.endings import NotStarted
from services.kernel.settings import SettingsError
from services.operations.backup import back_up, prune
from services.operations.findings import Severity
from services.operations.fsck import check
from services.operations.installation import Installation, find
from services.operations.restore import choose, restore, verify
from services.operations.telling import Teller
from services.operations.vaults import open_vault
from services.registry.rotation import drop_old_keys, rotate
from services.standalone.lock import locked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ekiben admin", description="Work on an installation as a whole.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path)
    shared.add_argument("--output", choices=("table", "json"), default="table")
    shared.add_argument("--without", action="append", default=[])
    command = commands.add_parser("backup", parents=[shared])
    command.add_argument("vault")
    command.add_argument("--keep", type=int, default=0)
    command = commands.add_parser("restore", parents=[shared])
    command.add_argument("vault")
    command.add_argument("--snapshot", default="")
    command.add_argument("--overwrite", action="store_true")
    command = commands.add_parser("verify", parents=[shared])
    command.add_argument("vault")
    command.add_argument("--snapshot", default="")
    command.add_argument("--deep", action="store_true")
    command = commands.add_parser("fsck", parents=[shared])
    command.add_argument("--deep", action="store_true")
    command.add_argument("--repair", action="store_true")
    command.add_argument("--from", dest="source", default="")
    command = commands.add_parser("rotate-keys", parents=[shared])
    command.add_argument("--drop-old", action="store_true")
    return parser


class _Run:
    """One command: what it was told, where it says what it does."""

    def __init__(self, arguments: argparse.Namespace, tell: Teller) -> None:
        self.arguments = arguments
        self.tell = tell

    def installation(self, *, may_make: bool = False) -> Installation:
        """Where everything is, without the services that are left out."""
        given = self.arguments
        found = find(given.data, may_make=may_make)
        return found.without(*given.without)

    def answer(self, data: dict[str, Any], *lines: str) -> None:
        """Print the result: for a program, or as sentences."""
        print(json.dumps(data, indent=2) if self.arguments.output == "json" else "\n".join(lines))

    async def backup(self) -> int:
        """Make a snapshot, then drop the oldest."""
        async with open_vault(self.arguments.vault, may_make=True) as vault:
            made = await back_up(self.installation(), vault, say=self.tell.say, progress=self.tell.progress)
            gone = (await prune(vault, self.arguments.keep))[0] if self.arguments.keep else []
        snapshot, blobs = made.snapshot, made.blobs
        lines = [
            f"Snapshot {snapshot.id}: {sum(sum(r.tables.values()) for r in snapshot.services.values()):,} rows, "
            f"{snapshot.blob_count:,} blobs of {size(snapshot.blob_bytes)}; {blobs.copied:,} were new, "
            f"{size(blobs.copied_bytes)}."
        ]
        if snapshot.damaged:
            lines.append(
                f"{len(snapshot.damaged)} blobs were missing or damaged and are not in it; `ekiben admin fsck --deep` "
                "says whose they are."
            )
        if snapshot.key_ids:
            lines.append("It has no keys: keep the key file of the secrets elsewhere, or its secrets cannot be read.")
        if gone:
            lines.append(f"{len(gone)} older snapshots were deleted.")
        self.answer({"snapshot": asdict(snapshot), "blobs": asdict(blobs), "deletedSnapshots": gone}, *lines)
        return 1 if snapshot.damaged else 0

    async def restore(self) -> int:
        """Put a snapshot into an empty installation."""
        given = self.arguments
        installation = self.installation(may_make=True)
        with locked(installation.data) if installation.data else contextlib.nullcontext():
            async with open_vault(given.vault) as vault:
                snapshot = await choose(vault, given.snapshot)
                done = await restore(
                    vault,
                    snapshot,
                    installation,
                    overwrite=given.overwrite,
                    say=self.tell.say,
                    progress=self.tell.progress,
                )
        lines = [
            f"Restored snapshot {snapshot.id} of {snapshot.create_time}: {done.blobs.copied:,} blobs were copied, "
            f"{done.blobs.there:,} were there."
        ]
        if done.blobs.damaged:
            lines.append(f"{len(done.blobs.damaged)} blobs are not in the backup: `ekiben admin fsck` says whose.")
        key_file = installation.key_file
        shared = any(not one.database_url.startswith("sqlite") for one in installation.databases.values())
        if (snapshot.key_ids or shared) and (key_file is None or not key_file.exists()):
            # On PostgreSQL a registry makes no key but at the very first start: a second machine's would be another.
            ids = f" ({', '.join(snapshot.key_ids)})" if snapshot.key_ids else ""
            lines.append(f"Before you start it put the key file of the secrets{ids} back.")
        self.answer({"snapshot": asdict(snapshot), "blobs": asdict(done.blobs)}, *lines)
        return 1 if done.blobs.damaged else 0

    async def verify(self) -> int:
        """Read a backup through."""
        async with open_vault(self.arguments.vault) as vault:
            snapshot = await choose(vault, self.arguments.snapshot)
            self.tell.say(f"Verifying snapshot {snapshot.id}")
            bad = await verify(vault, snapshot, deep=self.arguments.deep)
        told = f"Snapshot {snapshot.id} is whole."
        if bad:
            told = f"Snapshot {snapshot.id} lacks {len(bad)} of {snapshot.blob_count:,} blobs:\n" + "\n".join(bad)
        self.answer({"snapshot": asdict(snapshot), "damaged": bad}, told)
        return 1 if bad else 0

    async def fsck(self) -> int:
        """Look at everything, and say what is wrong."""
        given = self.arguments
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(open_vault(given.source)) if given.source else None
            report = await check(
                self.installation(),
                deep=given.deep,
                repair=given.repair,
                source=source,
                say=self.tell.say,
                progress=self.tell.progress,
            )
        counts = {severity: report.count(severity) for severity in Severity}
        lines = []
        for finding in report.findings:
            head = f"{'REPAIRED' if finding.repaired else finding.severity} {finding.check} {finding.resource}".rstrip()
            lines += [head, f"  {finding.what}", *([] if finding.repaired else [f"  {finding.then}"])]
        lines.append(
            f"Looked at {', '.join(sorted(report.services))} and {report.blobs:,} blobs of {size(report.blob_bytes)}: "
            f"{counts[Severity.ERROR]} errors, {counts[Severity.WARNING]} warnings, {counts[Severity.NOTE]} notes"
            + (f", {sum(f.repaired for f in report.findings)} repaired." if given.repair else ".")
        )
        data = {
            "services": sorted(report.services),
            "blobs": report.blobs,
            "blobBytes": report.blob_bytes,
            "findings": [finding.data() for finding in report.findings],
        }
        self.answer(data, *lines)
        return 1 if any(finding.failed for finding in report.findings) else 0

    async def rotate_keys(self) -> int:
        """Seal every secret with a new key, or drop the old ones."""
        installation = self.installation()
        if installation.key_file is None:
            raise SettingsError(["Nothing says where the key file is: set EKIBEN_REGISTRY_SECRETS_KEY_FILE."])
        async with open_database(installation.databases["registry"]) as database:
            if self.arguments.drop_old:
                dropped = await drop_old_keys(database, installation.key_file, SYSTEM)
                told = f"Dropped {', '.join(dropped)}." if dropped else "There is no old key."
                self.answer({"dropped": list(dropped)}, told)
                return 0
            self.tell.say("Sealing secrets")
            done = await rotate(database, installation.key_file)
        lines = [
            f"{'Went on with a rotation: ' if done.resumed else ''}{done.resealed} secrets are sealed anew, with the "
            f"key {done.key_id}."
        ]
        lines += [f"{name} is as it was. {why}" for name, why in done.failures.items()]
        if done.old_keys and not done.failures:
            lines.append(
                f"Backups from before need the old key ({', '.join(done.old_keys)}); `ekiben admin rotate-keys "
                "--drop-old` takes it out of the file."
            )
        self.answer(asdict(done), *lines)
        return 1 if done.failures else 0


_PLACES = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENOTDIR})
"""What is wrong with a place that somebody named, and not with us."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """An error of ours ends the process with its sentence; so does a folder that cannot be written to or is full."""
    try:
        yield
    except EkibenError as exc:
        raise NotStarted(exc.message) from exc
    except (OSError, ExceptionGroup) as exc:
        found: BaseException = exc
        while isinstance(found, ExceptionGroup):
            found = found.exceptions[0]
        if not isinstance(found, OSError) or found.errno not in _PLACES:
            raise
        named = f"{found.filename}: " if found.filename else ""
        raise NotStarted(
            f"{named}{found.strerror}. Name a place with room that this user may write to, then run the command again."
        ) from exc


async def _main(arguments: argparse.Namespace) -> int:
    with _told(), Steps() as steps:
        run = _Run(arguments, Teller(steps))
        work: Callable[[], Awaitable[int]] = getattr(run, arguments.command.replace("-", "_"))
        return await work()


def main() -> None:
    """Read the command line and do it; exits with 1 where something is wrong with what was looked at."""
    arguments = _parser().parse_args()
    codes: list[int] = []

    async def work() -> None:
        codes.append(await _main(arguments))

    endings.run(work())
    sys.exit(codes[0])


if __name__ == "__main__":
    main()
