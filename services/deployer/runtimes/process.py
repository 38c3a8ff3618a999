"""ProcessRuntime: replicas as processes of this machine.

    data_dir/bentos, models          content by digest, shared
    data_dir/replicas/{replica}      BENTOML_HOME and the rest of one replica; gone with it
    data_dir/homes/{deployment}      HOME of a deployment's replicas
    data_dir/logs/{deployment}       logs, also of replicas that are gone
    run_dir/r/{replica}              socket of a replica
    run_dir/d/{set}                  socket where a gateway passes calls on to a set
    run_dir/t/{replica}              sockets of a supervisor, temporary files
    run_dir/p                        states of the shims

Processes outlive a deployer that is killed, for a while: the next one adopts them. What it does not find a shim for is
ended before anything is started.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import shutil
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes import Event, Line, Phase, SetSpec, SetStatus, logs, podless, shells
from services.deployer.runtimes.exposures import Exposed, ExposureStatus
from services.deployer.runtimes.replica import Limits, Replica
from services.deployer.runtimes.sessions import SHELL, ExecSpec, Session
from services.deployer.runtimes.starting import Folders, Starter, not_running
from services.kernel import processes
from services.kernel.clock import SYSTEM, Clock
from services.kernel.processes import SupervisedProcess

log = logging.getLogger(__name__)

KEPT_LOGS = 20
"""How many logs of replicas that are gone are kept for each deployment."""
LONGEST_TMPDIR = 56
"""BentoML before 1.2 makes sockets `bentoml-uds-????????/<20 digits>.sock` below it, of at most 103 characters."""
# Who leaves first when a set shrinks: what serves least.
_VICTIMS = {Phase.CRASHED: 0, Phase.STARTING: 1, Phase.UNREADY: 2, Phase.READY: 3}


@dataclass
class _Set:
    """One replica set."""

    status: SetStatus
    spec: SetSpec | None = None
    replicas: dict[str, Replica] = field(default_factory=dict)


class ProcessRuntime:
    """See the module. Made by `open_process_runtime`."""

    def __init__(
        self,
        data_dir: Path,
        run_dir: Path,
        starter: Starter,
        *,
        limits: Limits | None = None,
        pass_environment: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._data, self._run, self._starter = data_dir, run_dir, starter
        self._limits, self._passed, self._clock = limits or Limits(), dict(pass_environment or {}), clock
        self.mark = processes.mark_of("deployer", data_dir)
        self._sets: dict[str, _Set] = {}
        self._changed = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._kept: set[asyncio.Task[None]] = set()
        self._closing = False

    # The port

    def scales(self, place: str) -> bool:
        """Nothing here scales by itself."""
        return False

    def knows(self, place: str) -> bool:
        """What runs was adopted at the start."""
        return True

    async def check(self, spec: SetSpec) -> None:
        """Refuse what is asked of pods."""
        podless.refuse(spec, self._starter.name)

    async def apply(self, spec: SetSpec, replicas: int) -> None:
        """Make the set, or tell it its environment anew, and scale it."""
        known = self._sets.get(spec.key)
        if known is None:
            known = self._sets[spec.key] = _Set(
                SetStatus(
                    spec.key,
                    spec.deployment,
                    spec.deployment_uid,
                    spec.revision,
                    spec.target,
                    spec.service,
                    0,
                    socket_path=str(self._starter.set_socket(spec.key)),
                )
            )
        self._starter.prepare_set(spec.key)
        known.spec = spec
        for replica in known.replicas.values():
            replica.spec, replica.legacy, replica.reason = self._complete(spec), spec.legacy, ""
        await self.scale(spec.key, replicas)

    async def scale(self, key: str, replicas: int) -> None:
        """Tell a set how many replicas to have."""
        known = self._sets.get(key)
        if known is None or self._closing:
            return
        known.status = replace(known.status, asked=replicas)
        active = [replica for replica in known.replicas.values() if not replica.retiring.is_set()]
        if len(active) > replicas:
            active.sort(key=lambda replica: -(replica.start_time or self._clock.now()).timestamp())
            active.sort(key=lambda replica: _VICTIMS.get(replica.phase, 0))
            for replica in active[: len(active) - replicas]:
                replica.retiring.set()
        elif known.spec is not None:
            for _ in range(replicas - len(active)):
                self._add(known, known.spec)
        if replicas == 0 and not known.replicas:
            self._sets.pop(key, None)
        self._wake()

    async def release(self, replicas: Collection[str]) -> None:
        """No request can reach these any more."""
        for known in self._sets.values():
            for id in known.replicas.keys() & set(replicas):
                known.replicas[id].released.set()

    async def observe(self) -> list[SetStatus]:
        """All sets."""
        self._changed.clear()
        found = []
        for known in self._sets.values():
            notes = {replica.note for replica in known.replicas.values() if replica.note}
            notes |= {podless.note(known.spec.pod)} - {""} if known.spec is not None else set()
            replicas = tuple(replica.status() for replica in known.replicas.values())
            found.append(replace(known.status, replicas=replicas, note="; ".join(sorted(notes))))
        return found

    async def changed(self) -> None:
        """Return once something may differ from the last `observe`."""
        await self._changed.wait()

    async def forget(self, deployment_uid: str) -> None:
        """Remove the logs and homes of a deployment without replicas."""
        for folder in ("logs", "homes"):
            await asyncio.to_thread(shutil.rmtree, self._data / folder / deployment_uid, ignore_errors=True)

    async def check_exposure(self, wanted: Exposed) -> None:
        """Nothing: nobody exposes what runs on one machine, see Addresses."""

    async def expose(self, wanted: Sequence[Exposed]) -> None:
        """Nothing."""

    async def stand_by(self) -> None:
        """Nothing: replicas are this machine's, and ended one by one."""

    def exposure(self, wanted: Exposed) -> ExposureStatus:
        """Never there."""
        return ExposureStatus(False, "EXPOSURE_UNSUPPORTED", "The runtime of this platform exposes nothing.")

    async def logs(
        self,
        deployment_uid: str,
        *,
        service: str = "",
        replica: str = "",
        tail: int = 100,
        since: datetime | None = None,
        follow: bool = False,
        previous: bool = False,
    ) -> AsyncIterator[Line]:
        """What replicas printed; of those that are gone only when asked for by their id."""
        services: dict[str, str] = {}
        began: dict[str, datetime | None] = {}

        def files() -> dict[str, Path]:
            found = {}
            for known in self._sets.values():
                if known.status.deployment_uid == deployment_uid and service in ("", known.status.service):
                    for id, one in known.replicas.items():
                        if replica in ("", id):
                            found[id] = one.folders.log
                            services[id], began[id] = known.status.service, one.start_time
            if replica and not found and re.fullmatch(r"[a-z0-9-]{1,64}", replica):
                gone = self._data / "logs" / deployment_uid / f"{replica}.log"
                if gone.exists():
                    found[replica] = gone
                    services[replica] = service
            return found

        if previous:
            # All runs of a replica are in one log, so that the lines to count are known only once it is read.
            kept: dict[str, deque[Line]] = {}
            async for id, when, text in logs.read(files, -1, follow=False):
                if when < (began.get(id) or when) and (since is None or when >= since):
                    lines = kept.setdefault(id, deque(maxlen=None if tail < 0 else tail))
                    lines.append(Line(id, services.get(id, ""), when, text))
            for line in sorted((line for lines in kept.values() for line in lines), key=lambda line: line.time):
                yield line
            return
        async for id, when, text in logs.read(files, tail, follow, since):
            yield Line(id, services.get(id, ""), when, text)

    async def events(self, deployment_uid: str, *, follow: bool = False) -> AsyncIterator[Event]:
        """None: nobody but this runtime does anything here, and what it does is said of each replica."""
        raise FailedPrecondition(
            "Replicas of this cluster are on one machine, where no events are written down; `ekiben deployments "
            "replicas` and `logs` say what happened to them.",
            reason="EVENTS_NOT_KEPT",
        )
        yield  # The port says that it is an iterator.

    @asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[Session]:
        """A command in a replica's environment: as its user, with its variables, in its folder."""
        if spec.debug_image:
            raise FailedPrecondition(
                "Replicas of this cluster are on one machine, where nothing is put beside them; leave the image out.",
                reason="DEBUG_UNSUPPORTED",
            )
        sets = [known for known in self._sets.values() if known.status.deployment_uid == spec.deployment_uid]
        replica = next((known.replicas[spec.replica] for known in sets if spec.replica in known.replicas), None)
        if replica is None or replica.process is None or replica.process.returncode is not None:
            raise not_running(spec.replica)
        launch = await self._starter.enter(spec.replica, replica.process.pid, spec.command or SHELL, tty=spec.tty)
        running = shells.run(launch.argv, launch.env, launch.cwd, tty=spec.tty, columns=spec.columns, rows=spec.rows)
        async with running as session:
            yield session

    # Its life

    async def open(self, tasks: asyncio.TaskGroup) -> None:
        """Adopt what a former deployer left, and end what nobody looks after."""
        self._tasks = tasks
        for folder in (self._data, self._run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Whoever can enter can make a dependency unpickle what he likes.
            folder.chmod(0o700)
        for folder in (self._data / "replicas", self._run / "r", self._run / "d", self._run / "t", self._run / "p"):
            folder.mkdir(mode=0o700, exist_ok=True)
        for process in await processes.adopt(self._run / "p"):
            await self._adopt(process)
        kept = {id for known in self._sets.values() for id in known.replicas}
        strays = await processes.end_strays(self.mark, keep=kept)
        await self._starter.sweep(kept)
        await asyncio.to_thread(self._sweep, kept)
        if kept or strays:
            log.info("replicas taken over", extra={"adopted": len(kept), "strays_ended": strays})

    async def drain(self, grace_s: float) -> None:
        """Retire every replica at once and wait until all have ended."""
        self._closing = True
        for known in self._sets.values():
            for replica in known.replicas.values():
                replica.hurry_s = grace_s
                replica.retiring.set()
        while any(known.replicas for known in self._sets.values()):
            self._changed.clear()
            await self._changed.wait()

    async def _adopt(self, process: SupervisedProcess) -> None:
        try:
            state: dict[str, Any] = json.loads((self._data / "replicas" / process.id / "replica.json").read_text())
            if state.get("runtime", "process") != self._starter.name:
                log.info("a replica of another runtime was ended", extra={"replica": process.id})
                await process.kill()
                return
            status = SetStatus(
                state["key"],
                state["deployment"],
                state["deployment_uid"],
                state["revision"],
                state["target"],
                state["service"],
                0,
                socket_path=str(self._starter.set_socket(state["key"])),
            )
        except (OSError, ValueError, KeyError):
            log.warning("a replica without its description was ended", extra={"replica": process.id})
            await process.kill()
            return
        known = self._sets.setdefault(status.key, _Set(status))
        replica = self._replica(process.id, known.status)
        replica.process = process
        replica.note = process.note
        replica.ready_once = state.get("ready_once", False)
        # It served a moment ago: a route table without it, until the first probe, would refuse requests for nothing.
        replica.phase = Phase.READY if replica.ready_once else Phase.STARTING
        replica.restart_count = state.get("restart_count", 0)
        replica.readiness_path = state.get("readiness_path", replica.readiness_path)
        replica.start_time = datetime.fromisoformat(state["start_time"]) if state.get("start_time") else None
        known.replicas[replica.id] = replica
        known.status = replace(known.status, asked=len(known.replicas))
        self._begin(known, replica)

    def _add(self, known: _Set, spec: SetSpec) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", spec.service.lower()).strip("-")[:20] or "replica"
        replica = self._replica(f"{slug}-{secrets.token_hex(4)}", known.status)
        replica.spec, replica.legacy = self._complete(spec), spec.legacy
        known.replicas[replica.id] = replica
        self._begin(known, replica)

    def _replica(self, id: str, status: SetStatus) -> Replica:
        own = self._data / "replicas" / id
        with contextlib.suppress(OSError):
            own.mkdir(mode=0o700, exist_ok=True)
            file = own / "replica.json"
            if not file.exists():
                known = {name: getattr(status, name) for name in _DESCRIBED}
                file.write_text(json.dumps(known))
        return Replica(
            id=id,
            mark=self.mark,
            folders=Folders(
                own=own,
                short=self._run / "t" / id,
                temporary=self._temporary(id),
                socket=self._starter.replica_socket(id),
                log=self._data / "logs" / status.deployment_uid / f"{id}.log",
                user_home=self._data / "homes" / status.deployment_uid,
                states=self._run / "p",
            ),
            limits=self._limits,
            clock=self._clock,
            starter=self._starter,
            changed=self._wake,
            spec=None,
        )

    def _begin(self, known: _Set, replica: Replica) -> None:
        task = self._tasks.create_task(self._keep(known, replica))
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def abandon(self) -> None:
        """Leave every process to the next owner."""
        for task in self._kept:
            task.cancel()

    def _temporary(self, id: str) -> Path:
        """TMPDIR of a replica: beside its sockets, but elsewhere where BentoML before 1.2 finds that too long."""
        folder = self._run / "t" / id / "t"
        return folder if len(str(folder)) <= LONGEST_TMPDIR else Path(f"/tmp/ek-{self.mark[-6:]}-{id[-8:]}")

    async def _keep(self, known: _Set, replica: Replica) -> None:
        await replica.run()
        known.replicas.pop(replica.id, None)
        if not known.replicas and known.status.asked == 0:
            self._sets.pop(known.status.key, None)
        await asyncio.to_thread(self._prune_logs, replica.folders.log.parent)
        specs = [known.spec for known in self._sets.values() if known.spec is not None]
        await self._starter.prune(specs, list(self._sets))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()

    def _complete(self, spec: SetSpec) -> SetSpec:
        return replace(spec, envs={**self._passed, **spec.envs})

    def _sweep(self, kept: Collection[str]) -> None:
        for parent in (self._data / "replicas", self._run / "r", self._run / "t"):
            for path in parent.iterdir():
                if path.name in kept:
                    continue
                shutil.rmtree(self._temporary(path.name), ignore_errors=True)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _prune_logs(self, folder: Path) -> None:
        living = {id for known in self._sets.values() for id in known.replicas}
        with contextlib.suppress(OSError):
            gone = [path for path in folder.glob("*.log") if path.stem not in living]
            for path in sorted(gone, key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
                for file in logs.files_of(path):
                    file.unlink(missing_ok=True)


_DESCRIBED = ("key", "deployment", "deployment_uid", "revision", "target", "service")


@asynccontextmanager
async def open_process_runtime(
    data_dir: Path, run_dir: Path, starter: Starter, **options: Any
) -> AsyncIterator[ProcessRuntime]:
    """A runtime on this machine. At the end its replicas are left to the next one, unless `drain` was called."""
    runtime = ProcessRuntime(data_dir, run_dir, starter, **options)
    failure: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        try:
            await runtime.open(tasks)
            yield runtime
        except Exception as exc:
            # The group would wrap it, and whoever stops the start with a sentence would not be recognized.
            failure = exc
        finally:
            runtime.abandon()
    if failure is not None:
        raise failure
