"""An organization's models and bentos as a folder, and from such a folder into another installation.

    FOLDER/blobs/sha256/ab/abcd…         archives by their digest, as they were pushed
    FOLDER/repositories.jsonl            messages as the HTTP API says them, a line each, oldest first
    FOLDER/versions.jsonl
    FOLDER/aliases.jsonl                 what each alias names; its history stays where it was made
    FOLDER/users.jsonl, secrets.jsonl    without tokens and values, which nobody can read
    FOLDER/export.json                   written last: how many lines each file has, and its sha256

Both go by the public API, as the user whose token is sent. Both can be repeated: what is there already is left, so one
that was killed is gone on with by running it again.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format

from ekiben import archives, localstore
from ekiben.client import Client
from ekiben.errors import AlreadyExists, DataLoss, EkibenError, FailedPrecondition, NotFound
from ekiben.identity.v1 import identity_pb2
from ekiben.registry.v1 import aliases_pb2, registry_pb2

T = TypeVar("T")

FORMAT = 1
_FILES = ("repositories", "versions", "aliases", "users", "secrets")
_AT_ONCE = 4
ORIGIN = "ekiben.dev/origin-"
"""Keys of annotations that say of an imported version when and by whom it was first made begin so."""

Progress = Callable[[str, int], None]
"""Told what has been done with how many bytes: `copied`, `there`, …"""


def no_progress(what: str, size_bytes: int) -> None:
    """Say nothing."""


@dataclass
class Exported:
    """What an export came to."""

    counts: dict[str, int] = field(default_factory=dict)
    copied: int = 0
    copied_bytes: int = 0
    there: int = 0
    without_content: list[str] = field(default_factory=list)
    """Versions that nothing was uploaded for: they are left out."""
    failures: dict[str, str] = field(default_factory=dict)
    """Versions whose bytes could not be read, and why."""


@dataclass
class Imported:
    """What an import came to; names of what was made, was there, or was left alone and why."""

    made: int = 0
    made_bytes: int = 0
    there: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    """Secrets that the other installation had and this one lacks: their values must be written by hand."""


async def export_to(client: Client, folder: Path, *, progress: Progress = no_progress) -> Exported:
    """Write all models and bentos of the caller's organization to `folder`, or what it lacks of them.

    Raises:
        DataLoss: bytes arrived damaged, again and again (DIGEST_MISMATCH).
    """
    done = Exported()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "export.json").unlink(missing_ok=True)
    lines: dict[str, list[Any]] = {name: [] for name in _FILES}
    # Before the versions that they name, which cannot be deleted meanwhile.
    for parent in ("modelRepositories/-", "bentoRepositories/-"):
        lines["aliases"] += [one async for one in client.aliases.list(parent)]
    lines["repositories"] = [
        *[one async for one in client.models.repositories()],
        *[one async for one in client.bentos.repositories()],
    ]
    ready = []
    for found in ([one async for one in client.models.list()], [one async for one in client.bentos.list()]):
        for version in found:
            if version.content.state == registry_pb2.Content.READY:
                ready.append(version)
            else:
                done.without_content.append(version.name)

    async def fetch(version: Any) -> None:
        try:
            fresh = await _fetch(client, folder, version, done, progress)
        except NotFound:
            return  # deleted meanwhile
        except EkibenError as exc:
            done.failures[version.name] = exc.message
            return
        lines["versions"].append(fresh)

    await _at_once(ready, fetch)
    there = {version.name for version in lines["versions"]}
    lines["aliases"] = [alias for alias in lines["aliases"] if alias.version in there]
    lines["users"] = [one async for one in client.users.list()]
    lines["secrets"] = [one async for one in client.secrets.list()]
    for kind in ("repositories", "versions"):
        lines[kind].sort(key=lambda one: one.create_time.ToNanoseconds())
    said: dict[str, Any] = {"format": FORMAT, "organization": (await client.users.organization()).name, "files": {}}
    for name in _FILES:
        text = "".join(f"{json.dumps(json_format.MessageToDict(one), ensure_ascii=False)}\n" for one in lines[name])
        _write(folder / f"{name}.jsonl", text)
        done.counts[name] = len(lines[name])
        said["files"][name] = {"lines": len(lines[name]), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    _write(folder / "export.json", json.dumps(said, indent=1))
    return done


async def _fetch(client: Client, folder: Path, version: Any, done: Exported, progress: Progress) -> Any:
    """Bring the archive of a version; the version as it is then: it may have been pushed anew since it was listed."""
    of = client.models if version.name.startswith("modelRepositories/") else client.bentos
    while True:
        path = _blob(folder, version.content.digest)
        if path.exists() and path.stat().st_size == version.content.size_bytes:
            done.there += 1
            progress("there", version.content.size_bytes)
            return version
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by its own name, which is no `.tar`; nothing is at `path` before it is whole and has its digest.
        arriving = path.with_name(f"{path.name}.{_flat(version.name)}.tar")
        await of.pull(version.name, arriving, unpack=False)
        now = await of.get(version.name)
        if await asyncio.to_thread(_sha256, arriving) == version.content.digest:
            arriving.replace(path)
            done.copied += 1
            done.copied_bytes += version.content.size_bytes
            progress("copied", version.content.size_bytes)
            return version
        arriving.unlink()
        if now.content.digest == version.content.digest:
            raise DataLoss(
                f"What arrived of {version.name} has another digest than {version.content.digest}. Try again.",
                reason="DIGEST_MISMATCH",
                resource=version.name,
            )
        version = now


async def import_from(
    client: Client, folder: Path, *, users: bool = False, progress: Progress = no_progress
) -> Imported:
    """Make what a folder holds and this installation lacks. What is here already, and otherwise, is left and told.

    Versions come in the order in which they were made, so that the newest is the newest here too; when and by whom
    they were made is kept in annotations. With `users` the users are made too, without tokens.

    Raises:
        FailedPrecondition: the folder is no export, or not a whole one (EXPORT_INCOMPLETE).
        DataLoss: a file of it is damaged (EXPORT_DAMAGED).
    """
    read = await asyncio.to_thread(_read, folder)
    done = Imported()
    for line in read["repositories"]:
        await _attempt(done, line["name"], _import_repository(client, line))
    for line in read["versions"]:
        await _attempt(done, line["name"], _import_version(client, folder, line, done, progress))
    for line in read["aliases"]:
        await _attempt(done, line["name"], _import_alias(client, line))
    for line in read["users"] if users else ():
        await _attempt(done, line["name"], _import_user(client, line))
    here = {one.name async for one in client.secrets.list()}
    done.secrets = sorted(line["name"] for line in read["secrets"] if line["name"] not in here)
    return done


async def _attempt(done: Imported, name: str, work: Awaitable[None]) -> None:
    """What is refused is told, and the rest goes on; a server that is away ends all of it."""
    try:
        await work
    except (AlreadyExists, FailedPrecondition, DataLoss, NotFound) as exc:
        done.failures[name] = exc.message


async def _import_repository(client: Client, line: dict[str, Any]) -> None:
    if line["name"].startswith("modelRepositories/"):
        model = json_format.ParseDict(line, registry_pb2.ModelRepository())
        wanted = registry_pb2.ModelRepository(name=model.name, description=model.description, labels=model.labels)
        wanted.annotations.update(model.annotations)
        await _unless_there(client.models.create_repository(wanted))
        return
    bento = json_format.ParseDict(line, registry_pb2.BentoRepository())
    kept = registry_pb2.BentoRepository(name=bento.name, description=bento.description, labels=bento.labels)
    kept.annotations.update(bento.annotations)
    await _unless_there(client.bentos.create_repository(kept))


async def _import_version(
    client: Client, folder: Path, line: dict[str, Any], done: Imported, progress: Progress
) -> None:
    is_model = line["name"].startswith("modelRepositories/")
    version: Any = json_format.ParseDict(line, registry_pb2.Model() if is_model else registry_pb2.Bento())
    of: Any = client.models if is_model else client.bentos
    wanted: Any = type(version)(description=version.description, labels=version.labels, manifest=version.manifest)
    wanted.annotations.update({**version.annotations, **_origin(version)})
    if version.HasField("build_time"):
        wanted.build_time.CopyFrom(version.build_time)
    await _unless_there(of.create(version.name, wanted))
    here = await of.get(version.name)
    if here.content.state == registry_pb2.Content.READY:
        if here.content.digest != version.content.digest:
            raise AlreadyExists(
                f"{version.name} is here with other content. Delete it to have this one, or keep it.",
                reason="IMPORT_CONFLICT",
                resource=version.name,
            )
        done.there += 1
        progress("there", version.content.size_bytes)
        return
    path = _blob(folder, version.content.digest)
    if not path.is_file() or await asyncio.to_thread(_sha256, path) != version.content.digest:
        raise DataLoss(
            f"The archive of {version.name} in the export is missing or damaged. Export again: that brings it back.",
            reason="EXPORT_DAMAGED",
            resource=version.name,
        )
    _, repository, _, number = version.name.split("/")
    source = localstore.Version(
        repository=repository,
        version=number,
        manifest=version.manifest,
        archive=await asyncio.to_thread(archives.of_file, path),
        labels=version.labels,
        description=version.description,
    )
    await of.push(source, resume=True)
    done.made += 1
    done.made_bytes += version.content.size_bytes
    progress("made", version.content.size_bytes)


async def _import_alias(client: Client, line: dict[str, Any]) -> None:
    alias = json_format.ParseDict(line, aliases_pb2.Alias())
    try:
        here = await client.aliases.get(alias.name)
    except NotFound:
        await client.aliases.set(alias.name, alias.version, expected="", reason="Imported.")
        return
    if here.version != alias.version:
        raise AlreadyExists(
            f"{alias.name} names {here.version} here, and {alias.version} there. Set it as it should be.",
            reason="IMPORT_CONFLICT",
            resource=alias.name,
        )


async def _import_user(client: Client, line: dict[str, Any]) -> None:
    user = json_format.ParseDict(line, identity_pb2.User())
    kept = ("name", "email", "first_name", "last_name", "role", "disabled")
    await _unless_there(client.users.create(identity_pb2.User(**{name: getattr(user, name) for name in kept})))


def _origin(version: Any) -> dict[str, str]:
    """When and by whom it was first made; what an earlier import says of that goes on."""
    first = {f"{ORIGIN}create-time": version.create_time.ToJsonString(), f"{ORIGIN}creator": version.creator}
    return {key: version.annotations.get(key, value) for key, value in first.items()}


async def _unless_there(creating: Awaitable[Any]) -> None:
    with contextlib.suppress(AlreadyExists):
        await creating


def _blob(folder: Path, digest: str) -> Path:
    hexdigest = digest.removeprefix("sha256:")
    return folder / "blobs" / "sha256" / hexdigest[:2] / hexdigest


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        said = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        files = said["files"]
    except FileNotFoundError:
        raise FailedPrecondition(
            f"{folder} holds no whole export. Run `ekiben admin export` to its end.",
            reason="EXPORT_INCOMPLETE",
            path=folder,
        ) from None
    except (ValueError, KeyError, TypeError) as exc:
        raise _damaged("export.json") from exc
    if said.get("format", 0) > FORMAT:
        raise FailedPrecondition(
            f"A newer release made the export in {folder}. Use that one.", reason="EXPORT_INCOMPLETE", path=folder
        )
    read = {}
    for name in _FILES:
        try:
            text = (folder / f"{name}.jsonl").read_bytes()
        except FileNotFoundError:
            raise _damaged(f"{name}.jsonl") from None
        if hashlib.sha256(text).hexdigest() != files.get(name, {}).get("sha256"):
            raise _damaged(f"{name}.jsonl")
        read[name] = [json.loads(line) for line in text.decode().split("\n") if line]
    return read


def _damaged(file: str) -> DataLoss:
    return DataLoss(f"{file} of the export is damaged. Export again.", reason="EXPORT_DAMAGED", file=file)


async def _at_once(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(item: T) -> None:
        async with limit:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(one(item))
