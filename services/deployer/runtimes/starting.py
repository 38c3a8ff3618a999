"""How a replica becomes a process tree: as a process in the environment of its bento, or as a container of its image.

The runtime keeps trees alive, whatever is in them; a `Starter` knows what to run and what it leaves behind.
"""

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes import SetSpec, serving

CONTENT_KEPT_S = 24 * 3600.0
"""Content that no set uses is kept this long, for a rollback."""

OUT_OF_MEMORY = "It used more memory than its instance type has, so the kernel ended it."

Fetch = Callable[[str, Path], Awaitable[None]]
"""Puts the content of a bento or a model into a folder that does not exist yet."""


@dataclass(frozen=True)
class Folders:
    """Where a runtime keeps what belongs to one replica."""

    own: Path
    """Gone with the replica."""
    short: Path
    """Gone with the replica; for sockets."""
    temporary: Path
    """Gone with the replica."""
    socket: Path
    log: Path
    user_home: Path
    states: Path
    """Of the shims."""


@dataclass(frozen=True)
class Launch:
    """What the shim of a replica is told."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    memory_limit_bytes: int = 0
    cpu_millicores: int = 0
    note: str = ""
    """Limits that are not kept, in words."""


class Starter(Protocol):
    """See the module."""

    name: str
    """What the setting calls it."""

    def replica_socket(self, replica: str) -> Path:
        """Where a replica listens."""
        ...

    def set_socket(self, key: str) -> Path:
        """Where a gateway listens for the calls to a replica set."""
        ...

    def prepare_set(self, key: str) -> None:
        """See to it that a gateway can listen there, and replicas can call it."""
        ...

    async def start(self, replica: str, spec: SetSpec, folders: Folders, tell: Callable[[str], None]) -> Launch:
        """Bring what a replica needs, and say how to run it. `tell` takes what is waited for, in words.

        Raises:
            FailedPrecondition: what the builder made is not there (ENVIRONMENT_MISSING, IMAGE_MISSING).
        """
        ...

    async def enter(self, replica: str, pid: int, command: Sequence[str], *, tty: bool) -> Launch:
        """How to run a command where a replica is, in its environment. `pid` is that of its main process.

        Raises:
            FailedPrecondition: it has just ended (REPLICA_NOT_RUNNING).
        """
        ...

    async def ended(self, replica: str, returncode: int | None) -> str:
        """The tree of a replica has ended. Why, where it knows that better than the return code; else empty."""
        ...

    async def clean(self, replica: str) -> None:
        """A replica is gone."""
        ...

    async def sweep(self, kept: Collection[str]) -> None:
        """Get ready to start replicas, and remove what belongs to those that are not kept.

        Raises:
            SettingsError: nothing can be started on this machine.
        """
        ...

    async def prune(self, specs: Collection[SetSpec], keys: Collection[str]) -> None:
        """Remove content that no set uses and none has used for a while: a rollback may want it again soon.

        Args:
            specs: of the sets that have been told theirs; after a start that may not be all.
            keys: of all sets.
        """
        ...


class ProcessStarter:
    """Replicas as processes of this machine, in the environment that the builder made for their bento."""

    name = "process"

    def __init__(self, data_dir: Path, run_dir: Path, fetch: Fetch, telemetry: serving.Telemetry) -> None:
        self._data, self._run, self._fetch, self._telemetry = data_dir, run_dir, fetch, telemetry
        self._fetching: dict[Path, asyncio.Lock] = {}

    def replica_socket(self, replica: str) -> Path:
        """See Starter."""
        return self._run / "r" / replica

    def set_socket(self, key: str) -> Path:
        """See Starter."""
        return self._run / "d" / key

    def prepare_set(self, key: str) -> None:
        """See Starter."""
        if self.set_socket(key).is_dir():
            # Left by a deployer that ran containers.
            shutil.rmtree(self.set_socket(key), ignore_errors=True)

    async def start(self, replica: str, spec: SetSpec, folders: Folders, tell: Callable[[str], None]) -> Launch:
        """See Starter."""
        tell("Its content is being fetched.")
        if not (Path(spec.environment) / "bin" / "python").exists():
            raise FailedPrecondition(f"The environment {spec.environment} is not there.", reason="ENVIRONMENT_MISSING")
        bento = await self._ensure("bentos", spec.bento, spec.bento_digest)
        models = {name: await self._ensure("models", name, digest) for name, digest in spec.models}
        return await asyncio.to_thread(self._prepare, replica, spec, folders, bento, models)

    async def enter(self, replica: str, pid: int, command: Sequence[str], *, tty: bool) -> Launch:
        """See Starter. What it was started with may be another by now: the kernel knows what this one has."""
        try:
            variables = await asyncio.to_thread(Path(f"/proc/{pid}/environ").read_bytes)
            folder = await asyncio.to_thread(os.readlink, f"/proc/{pid}/cwd")
        except OSError as exc:
            raise not_running(replica) from exc
        pairs = (os.fsdecode(each).partition("=") for each in variables.split(b"\0") if b"=" in each)
        env = {name: value for name, _, value in pairs}
        return Launch(command, env | {"TERM": "xterm-256color"} if tty else env, Path(folder))

    async def ended(self, replica: str, returncode: int | None) -> str:
        """See Starter."""
        return ""

    async def clean(self, replica: str) -> None:
        """See Starter."""

    async def sweep(self, kept: Collection[str]) -> None:
        """See Starter."""

    async def prune(self, specs: Collection[SetSpec], keys: Collection[str]) -> None:
        """See Starter."""
        used = {digest for spec in specs for digest in (spec.bento_digest, *(digest for _, digest in spec.models))}
        await asyncio.to_thread(self._prune, used)

    def _prepare(
        self, replica: str, spec: SetSpec, folders: Folders, bento: Path, models: Mapping[str, Path]
    ) -> Launch:
        own = folders.own
        home = own / "home"
        for folder in (home / "models", own / "monitoring", folders.user_home, folders.short):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folders.temporary.mkdir(mode=0o700, exist_ok=True)
        if folders.temporary.stat().st_uid != os.getuid():
            raise OSError(f"{folders.temporary} belongs to somebody else")
        if spec.files:
            # Files go below the bento for this replica only, so it gets a bento of its own.
            shutil.rmtree(own / "bento", ignore_errors=True)
            shutil.copytree(bento, own / "bento", symlinks=True)
            bento = own / "bento"
        places = serving.Places(
            home,
            folders.user_home,
            folders.temporary,
            bento,
            folders.socket,
            folders.short,
            own / "monitoring",
        )
        for name, folder in models.items():
            _, repository, _, version = name.split("/")
            link = home / "models" / repository / version
            link.parent.mkdir(exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(folder, target_is_directory=True)
            (link.parent / "latest").write_text(version)
        serving.write_files(spec, places)
        exports = serving.exports_of(Path(spec.environment))
        if spec.legacy:
            (home / "bentoml.yaml").write_text(json.dumps(serving.legacy_config(spec, self._telemetry, exports)))
        sockets = {service: self.set_socket(key) for service, key in spec.dependencies}
        python = f"{spec.environment}/bin/python"
        return Launch(
            serving.command(spec, places, sockets, python=python, launcher=serving.LAUNCHER, drain_s=spec.drain_s),
            serving.environment(
                spec,
                places,
                self._telemetry,
                exports,
                replica,
                {"PATH": f"{spec.environment}/bin:/usr/local/bin:/usr/bin:/bin", "VIRTUAL_ENV": spec.environment},
            ),
            bento,
            spec.memory_bytes,
            spec.cpu_millicores,
        )

    async def _ensure(self, kind: str, name: str, digest: str) -> Path:
        folder = self._data / kind / digest.removeprefix("sha256:")
        async with self._fetching.setdefault(folder, asyncio.Lock()):
            if not folder.exists():
                folder.parent.mkdir(mode=0o700, exist_ok=True)
                await self._fetch(name, folder)
            with contextlib.suppress(OSError):
                os.utime(folder)
        return folder

    def _prune(self, used: Collection[str]) -> None:
        long_ago = time.time() - CONTENT_KEPT_S
        for kind in ("bentos", "models"):
            with contextlib.suppress(OSError):
                for folder in (self._data / kind).iterdir():
                    if f"sha256:{folder.name}" not in used and folder.stat().st_mtime < long_ago:
                        shutil.rmtree(folder, ignore_errors=True)


def not_running(replica: str) -> FailedPrecondition:
    """Nothing can be run in a replica that does not run."""
    return FailedPrecondition(
        f"Replica {replica} does not run now, so that nothing can be run in it; `ekiben deployments replicas` lists "
        "those that do, and `logs` says how it ended.",
        reason="REPLICA_NOT_RUNNING",
        replica=replica,
    )
