"""`ekiben admin`: the installation as a whole. On the machine where it is, or with its settings in the environment."""

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ekiben import exports
from ekiben.cli.becoming import become
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import F, output_option, table_or_json
from ekiben.cli.output import Column, last, moment, print_items, said, size, tag
from ekiben.cli.progress import Steps
from ekiben.cli.session import run
from ekiben.cli.up import default_data
from ekiben.client import Client
from ekiben.registry.v1 import garbage_pb2

SERVICES = ("registry", "deployer", "builder", "recorder")


@click.group(cls=NounGroup)
def admin() -> None:
    """The installation as a whole: backup, restore, check, keys, garbage.

    `gc`, `export` and `import` ask the server that runs. The others work on the databases and the blobs themselves,
    whether the platform runs or not: run them where it runs, as the user who runs it. They find everything in the data
    folder of `ekiben up`; of services that run alone, by the same variables as those have
    (EKIBEN_REGISTRY_DATABASE_URL, EKIBEN_REGISTRY_BLOBS_URL and so on).
    """


@dataclass(frozen=True)
class Place:
    """Where the installation is, as the options say."""

    data: Path | None = None
    database: str | None = None
    database_password_file: Path | None = None
    blobs: str | None = None


def _place_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `ekiben up` that say where everything is, as one argument `place`."""

    @functools.wraps(function)
    def placed(*arguments: Any, **options: Any) -> Any:
        found = {name: options.pop(name) for name in ("data", "database", "database_password_file", "blobs")}
        return function(*arguments, place=Place(**found), **options)

    options = [
        click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="Data folder of `ekiben up`."),
        click.option("--database", metavar="URL", help="As `ekiben up` is told.  [env: EKIBEN_DATABASE_URL]"),
        click.option(
            "--database-password-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="As `ekiben up` is told.  [env: EKIBEN_DATABASE_PASSWORD_FILE]",
        ),
        click.option("--blobs", metavar="URL", help="As `ekiben up` is told.  [env: EKIBEN_BLOBS_URL]"),
    ]
    command: Callable[..., Any] = placed
    for option in reversed(options):
        command = option(command)
    return command


def _without_option(function: F) -> F:
    return click.option(
        "--without", multiple=True, type=click.Choice(SERVICES), help="Leave a service's rows out. Repeatable."
    )(function)


_output_option = table_or_json("How to print the result.")


def _start(command: str, place: Place, output: str, *arguments: str) -> None:
    """Become the process that does it; the client itself has no database in it."""
    # By the environment: the command line of a process is there for every user of the machine to see.
    for name, value in (
        ("EKIBEN_DATABASE_URL", place.database),
        ("EKIBEN_DATABASE_PASSWORD_FILE", place.database_password_file),
        ("EKIBEN_BLOBS_URL", place.blobs),
    ):
        if value is not None:
            os.environ[name] = str(value)
    data = (place.data or default_data()).expanduser().absolute()
    become("services.operations.__main__", command, "--data", data, "--output", output, *arguments)


def _repeated(name: str, values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in (name, value)]


@admin.command()
@click.argument("vault")
@click.option("--keep", type=click.IntRange(0), default=0, help="Delete all but so many snapshots; 0 keeps all.")
@_without_option
@_place_options
@_output_option
def backup(vault: str, keep: int, without: tuple[str, ...], place: Place, output: str) -> None:
    """Add a snapshot of rows and blobs to VAULT, a folder or s3://bucket/prefix?endpoint=….

    While the platform runs: rows are those of one moment, and every blob that they name is copied, new ones only. A
    backup that is killed leaves no snapshot, and the next one goes on where it was.

    The key file of the secrets is not in it: keep that elsewhere. Exits with 1 where blobs were damaged already.

    \b
    ekiben admin backup /mnt/backup/ekiben --keep 14
    ekiben admin backup s3://backups/ekiben --without recorder
    """
    arguments = [vault, "--keep", str(keep), *_repeated("--without", without)]
    _start("backup", place, output, *arguments)


@admin.command()
@click.argument("vault")
@click.option("--snapshot", default="", metavar="ID", help="Which; the newest unless told.")
@click.option("--overwrite", is_flag=True, help="Give up what the databases hold.")
@_without_option
@_place_options
@_output_option
def restore(vault: str, snapshot: str, overwrite: bool, without: tuple[str, ...], place: Place, output: str) -> None:
    """Put a snapshot of VAULT into an installation that is empty and does not run.

    The databases and the blob store may be of another kind than those that were backed up. Everything is verified
    before anything is written; killed in between, run it again with --overwrite.

    \b
    ekiben admin restore /mnt/backup/ekiben --data /srv/ekiben
    """
    arguments = [vault, "--snapshot", snapshot, *_repeated("--without", without)]
    arguments += ["--overwrite"] if overwrite else []
    _start("restore", place, output, *arguments)


@admin.command()
@click.argument("vault")
@click.option("--snapshot", default="", metavar="ID", help="Which; the newest unless told.")
@click.option("--deep", is_flag=True, help="Read and hash every blob.")
@_output_option
def verify(vault: str, snapshot: str, deep: bool, output: str) -> None:
    """Read a snapshot of VAULT through and say whether it is whole; exits with 1 when not."""
    arguments = [vault, "--snapshot", snapshot, *(["--deep"] if deep else [])]
    _start("verify", Place(), output, *arguments)


@admin.command()
@click.option("--deep", is_flag=True, help="Read and hash every blob, and count what is usually believed.")
@click.option("--repair", is_flag=True, help="Mend what loses nothing.")
@click.option("--from", "source", default="", metavar="VAULT", help="Take lost bytes from this backup when repairing.")
@_without_option
@_place_options
@_output_option
def fsck(deep: bool, repair: bool, source: str, without: tuple[str, ...], place: Place, output: str) -> None:
    """Find and explain every inconsistency between rows, and between rows and bytes.

    While the platform runs or not. Exits with 1 where something is wrong that was not repaired; warnings and notes do
    not count. To put bytes back into a blob store of files, stop the platform first.

    \b
    ekiben admin fsck --deep -o json
    ekiben admin fsck --repair --from /mnt/backup/ekiben
    """
    arguments = [word for word, wanted in (("--deep", deep), ("--repair", repair)) if wanted]
    arguments += ["--from", source] if source else []
    _start("fsck", place, output, *arguments, *_repeated("--without", without))


@admin.command("rotate-keys")
@click.option("--drop-old", is_flag=True, help="Take keys that seal nothing any more out of the file, and stop.")
@_place_options
@_output_option
def rotate_keys(drop_old: bool, place: Place, output: str) -> None:
    """Seal every secret with a new key.

    Registries that run read the changed file by themselves. Killed in between, run it again: it goes on. The old key
    stays in the file, since older backups need it, until --drop-old.
    """
    _start("rotate-keys", place, output, *(["--drop-old"] if drop_old else []))


@admin.command()
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and change nothing.")
@output_option
@run
async def gc(client: Client, dry_run: bool, output: str) -> None:
    """Free bytes that nothing names any more, now, as the server does by itself every few minutes.

    Each line says what went and who held it last; each blob that went is in `ekiben audit list` too.

    \b
    ekiben admin gc --dry-run
    """
    found = [item async for item in client.garbage.collect(dry_run=dry_run)]
    kind = garbage_pb2.GarbageItem
    columns: list[Column] = [
        ("KIND", lambda g: kind.Kind.Name(g.kind).lower().replace("_", " ")),
        ("SIZE", lambda g: size(g.size_bytes) if g.size_bytes else ""),
        ("LAST HELD BY", lambda g: tag(g.last_holder)),
        ("UNTIL", lambda g: moment(g.release_time)),
        ("NAME", lambda g: g.name),
    ]
    print_items(found, columns, output, empty="Nothing to free.")
    blobs = [one for one in found if one.kind in (kind.BLOB, kind.PARTS)]
    held = any(one.kind == kind.HOLD for one in found)
    what = "would be freed" if dry_run else "freed"
    said(f"{size(sum(one.size_bytes for one in blobs))} {what}" + (", once the hold has ended." if held else "."))


@admin.command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@run
async def export(client: Client, folder: Path) -> None:
    """Write all models and bentos of the organization to FOLDER, for `import` elsewhere.

    By the API of the server that runs, with the archives as they were pushed, what aliases name, and the names of
    users and secrets; no tokens, no values of secrets, no deployments. Run again it brings only what the folder lacks,
    also after it was killed.

    \b
    ekiben admin export /mnt/handover
    ekiben --endpoint https://new.example.com admin import /mnt/handover
    """
    with Steps() as steps:
        steps.now("Exporting")
        total = _Total(steps, "Exporting")
        done = await exports.export_to(client, folder, progress=total)
    for name, why in sorted(done.failures.items()):
        said(f"{tag(name)}: {why}")
    if done.without_content:
        said(f"{len(done.without_content)} versions have no content and are left out.")
    said(
        f"{done.counts['versions']:,} versions of {done.counts['repositories']:,} repositories are in {folder}: "
        f"{done.copied:,} archives of {size(done.copied_bytes)} were copied, {done.there:,} were there."
    )
    if done.failures:
        click.get_current_context().exit(1)


@admin.command("import")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--users", is_flag=True, help="Make the users too, without tokens.")
@run
async def import_(client: Client, folder: Path, users: bool) -> None:
    """Make what an export in FOLDER holds and this server lacks.

    Every archive is verified. What is here already is left as it is; where it is something else, that is told, and the
    exit status is 1. Run again it goes on where it was. The annotations ekiben.dev/origin-create-time and
    ekiben.dev/origin-creator say when and by whom a version was first made.
    """
    with Steps() as steps:
        steps.now("Importing")
        done = await exports.import_from(client, folder, users=users, progress=_Total(steps, "Importing"))
    for name, why in sorted(done.failures.items()):
        said(f"{tag(name)}: {why}")
    if done.secrets:
        said(f"Write these secrets by hand: {', '.join(map(last, done.secrets))}.")
    said(f"{done.made:,} versions of {size(done.made_bytes)} were made, {done.there:,} were there.")
    if done.failures:
        click.get_current_context().exit(1)


class _Total:
    """Says now and then how much has passed."""

    def __init__(self, steps: Steps, what: str) -> None:
        self._steps, self._what = steps, what
        self._count = self._bytes = 0
        self._told = time.monotonic()

    def __call__(self, what: str, size_bytes: int) -> None:
        self._count += 1
        self._bytes += size_bytes
        if time.monotonic() - self._told > (0.2 if sys.stderr.isatty() else 10):
            self._told = time.monotonic()
            self._steps.now(f"{self._what}: {self._count:,} versions, {size(self._bytes)}")
