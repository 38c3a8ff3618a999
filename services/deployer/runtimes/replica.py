"""One replica as a process: started, probed, started again, drained."""

import asyncio
import contextlib
import json
import logging
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp

from ekiben.errors import EkibenError
from services.deployer.runtimes import Phase, ReplicaStatus, SetSpec, logs
from services.deployer.runtimes.starting import OUT_OF_MEMORY, Folders, Starter
from services.kernel import processes
from services.kernel.clock import Clock
from services.kernel.processes import ProcessSpec, SupervisedProcess

log = logging.getLogger(__name__)

STARTING_PROBE_S = 0.2
READY_PROBE_S = 1.0
LEGACY_PROBE_S = 5.0
"""BentoML before 1.2 writes a line into its access log for each probe."""
PROBES_UNTIL_UNREADY = 2
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STABLE_S = 60.0
"""After so long a run the next crash is taken for a first one."""
RELEASE_TIMEOUT_S = 30.0
"""A gateway that never says what it routes by must not keep a replica for ever."""
ORPHAN_STOP_S = 8.0
"""Grace for a replica which nobody adopted: no gateway routes to it, or none that anybody looks after."""
LAST_LINES = 20
MESSAGE_BYTES = 4000


@dataclass(frozen=True)
class Limits:
    """Times that settings give."""

    probe_timeout_s: float = 2.0
    start_timeout_s: float = 1800.0
    liveness_s: float = 20.0
    orphan_grace_s: float = 20.0
    log_max_bytes: int = 8 << 20
    log_keep: int = 3


@dataclass
class Replica:
    """The process of one replica, whoever started it."""

    id: str
    mark: str
    folders: Folders
    limits: Limits
    clock: Clock
    starter: Starter
    changed: Callable[[], None]
    spec: SetSpec | None
    legacy: bool = False
    readiness_path: str = "/readyz"
    """Of one that was adopted, until it is told its spec."""
    process: SupervisedProcess | None = None
    phase: Phase = Phase.STARTING
    message: str = ""
    restart_count: int = 0
    failed_starts: int = 0
    start_time: datetime | None = None
    ready_once: bool = False
    note: str = ""
    reason: str = ""
    retiring: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    hurry_s: float | None = None
    """Grace at the end, where it is shorter than the set's."""
    _crashes: int = 0
    _last_end: str = ""
    _last_lines: str = ""

    def status(self) -> ReplicaStatus:
        """What is seen of it now."""
        return ReplicaStatus(
            self.id,
            self.phase,
            f"unix:{self.folders.socket}",
            f"{self.message} {self._last_end}" if self._last_end and self.phase is Phase.STARTING else self.message,
            self._last_lines,
            self.restart_count,
            self.failed_starts,
            self.start_time,
            self.reason,
        )

    async def run(self) -> None:
        """Keep it alive until it is retired and drained. Cancelled, it leaves the process to be adopted."""
        try:
            while not self.retiring.is_set():
                try:
                    if self.process is None:
                        self.process = await self._start()
                    await self._watch(self.process)
                except EkibenError as exc:
                    self.failed_starts += 1
                    self.reason = exc.reason
                    self._see(Phase.CRASHED, str(exc))
                except OSError as exc:
                    self.failed_starts += 1
                    self._see(Phase.CRASHED, f"It cannot be started: {exc}.")
                except Exception:
                    log.exception("replica could not be kept", extra={"replica": self.id})
                    self.failed_starts += 1
                    self._see(
                        Phase.CRASHED, "It cannot be started for a fault in the platform; see the deployer's log."
                    )
                if self.process is not None and self.process.returncode is None:
                    await self.process.kill()
                self.process = None
                if not self.retiring.is_set():
                    await self._pause()
                    self.restart_count += 1
        except asyncio.CancelledError:
            if self.process is not None and self.process.returncode is None:
                self.process.detach()
            raise
        await self.starter.clean(self.id)
        await asyncio.to_thread(self._clean)

    # Starting

    async def _start(self) -> SupervisedProcess:
        spec = self.spec
        if spec is None:
            raise EkibenError("It was not told what to run.")
        launch = await self.starter.start(
            self.id, spec, self.folders, lambda message: self._see(Phase.STARTING, message)
        )
        await asyncio.to_thread(self.save)
        self.ready_once = False
        self.start_time = self.clock.now()
        process = await processes.start(
            ProcessSpec(
                id=self.id,
                argv=launch.argv,
                env=launch.env,
                cwd=launch.cwd,
                log_file=self.folders.log,
                log_max_bytes=self.limits.log_max_bytes,
                log_keep=self.limits.log_keep,
                stop_grace_s=min(spec.drain_s, ORPHAN_STOP_S),
                orphan_grace_s=self.limits.orphan_grace_s,
                memory_limit_bytes=launch.memory_limit_bytes,
                cpu_millicores=launch.cpu_millicores,
                mark=self.mark,
            ),
            self.folders.states,
        )
        self.note, self.reason = process.note or launch.note, ""
        self._see(Phase.STARTING, "It is starting.")
        return process

    # Watching

    async def _watch(self, process: SupervisedProcess) -> None:
        ended: asyncio.Future[Any] = asyncio.ensure_future(process.wait())
        retired: asyncio.Future[Any] = asyncio.ensure_future(self.retiring.wait())
        connector = aiohttp.UnixConnector(str(self.folders.socket), force_close=True)
        timeout = aiohttp.ClientTimeout(total=self.limits.probe_timeout_s)
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                given_up = await self._probe_until(process, session, ended, retired)
        finally:
            for waiter in (ended, retired):
                waiter.cancel()
        if given_up or (ended.done() and not ended.cancelled()):
            await self._ended(process, given_up)
        elif self.retiring.is_set():
            await self._drain(process)

    async def _probe_until(
        self,
        process: SupervisedProcess,
        session: aiohttp.ClientSession,
        ended: "asyncio.Future[Any]",
        retired: "asyncio.Future[Any]",
    ) -> str:
        """Probe until it ends or is to end: empty; or until it is given up and stopped: why."""
        began = alive_at = self.clock.monotonic()
        failures = 0
        ready_since = 0.0
        while True:
            pause = STARTING_PROBE_S if self.phase is not Phase.READY else READY_PROBE_S
            if self.phase is Phase.READY and self.legacy:
                pause = LEGACY_PROBE_S
            await asyncio.wait({ended, retired}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() or retired.done():
                return ""
            probe = asyncio.ensure_future(self._probe(session))
            waiting: set[asyncio.Future[Any]] = {ended, retired, probe}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not probe.done():
                    probe.cancel()
            if ended.done() or retired.done():
                return ""
            status, path = probe.result()
            now = self.clock.monotonic()
            if status:
                alive_at = now
            if status == 200:
                failures = 0
                if self.phase is not Phase.READY:
                    ready_since = now
                    self.failed_starts = 0
                    self._see(Phase.READY, "")
                if not self.ready_once:
                    self.ready_once = True
                    await asyncio.to_thread(self.save)
                if now - ready_since > STABLE_S:
                    self._crashes = 0
                continue
            failures += 1
            if self.phase is Phase.READY and failures >= PROBES_UNTIL_UNREADY:
                said = f"answers {path} with {status}" if status else "does not answer its readiness probe"
                self._see(Phase.UNREADY, f"It {said}.")
            elif self.phase is Phase.STARTING and status:
                self._see(Phase.STARTING, f"It runs, but is not ready: it answers {path} with {status}.")
            if self.ready_once and now - alive_at > self.limits.liveness_s:
                return await self._give_up(process, f"It answered nothing for {self.limits.liveness_s:.0f} s.")
            if not self.ready_once and now - began > self.limits.start_timeout_s:
                said = f" It answered {path} with {status}." if status else ""
                why = f"It was not ready within {self.limits.start_timeout_s:.0f} s.{said}"
                return await self._give_up(process, why)

    async def _probe(self, session: aiohttp.ClientSession) -> tuple[int, str]:
        """The status that it answers with, and what was asked; 0 where it answers nothing in time."""
        try:
            path = self.spec.readiness_path if self.spec is not None else self.readiness_path
            async with session.get(f"http://replica{path}", allow_redirects=False) as response:
                return response.status, path
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0, ""

    async def _give_up(self, process: SupervisedProcess, why: str) -> str:
        self._see(Phase.UNREADY, why)
        await process.stop(2.0)
        return why

    async def _ended(self, process: SupervisedProcess, why: str = "") -> None:
        code = process.returncode
        known = await self.starter.ended(self.id, code)
        if not why and process.out_of_memory:
            why = OUT_OF_MEMORY
        elif not why and process.shim_lost:
            why = "The process that looks after it was killed."
        elif not why and known:
            why = known
        elif not why:
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code is not None and code < 0
                else f"exited with {code}"
            )
            why = f"It {how}."
        if not self.ready_once:
            self.failed_starts += 1
        lines = await asyncio.to_thread(logs.tail_text, self.folders.log, LAST_LINES, self.start_time)
        text = "\n".join(lines)
        if self.spec is not None:
            # The same long path at the beginning of each line of a traceback would push out what it is about.
            text = re.sub(re.escape(f"{self.spec.environment}/lib/") + r"python[0-9.]+/site-packages/", "", text)
        self._last_lines = text[-MESSAGE_BYTES:]
        self._see(Phase.CRASHED, why)
        log.info("replica ended", extra={"replica": self.id, "returncode": code, "why": why})

    async def _pause(self) -> None:
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._crashes)
        self._crashes = min(self._crashes + 1, 10)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.retiring.wait(), pause)

    async def _drain(self, process: SupervisedProcess) -> None:
        routed = self.ready_once
        self._see(Phase.DRAINING, "It finishes its requests.")
        if routed:
            ended: asyncio.Future[Any] = asyncio.ensure_future(process.wait())
            released: asyncio.Future[Any] = asyncio.ensure_future(self.released.wait())
            try:
                await asyncio.wait({ended, released}, timeout=RELEASE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended.cancel()
                released.cancel()
        grace = self.spec.drain_s if self.spec is not None else self.limits.orphan_grace_s
        await process.stop(grace if self.hurry_s is None else min(grace, self.hurry_s))

    # Keeping

    def save(self) -> None:
        """Write down what an adopter needs; the environment, which holds secrets, is not among it."""
        with contextlib.suppress(OSError):
            file = self.folders.own / "replica.json"
            state = json.loads(file.read_text()) if file.exists() else {}
            state |= {
                "ready_once": self.ready_once,
                "restart_count": self.restart_count,
                "start_time": self.start_time.isoformat() if self.start_time else "",
                "runtime": self.starter.name,
                "readiness_path": self.spec.readiness_path if self.spec is not None else self.readiness_path,
            }
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(state))
            temporary.replace(file)

    def _see(self, phase: Phase, message: str) -> None:
        if phase is Phase.CRASHED:
            self._last_end = f"Before: {message}"
        elif phase is Phase.READY:
            self._last_end = self._last_lines = ""
        if (phase, message) != (self.phase, self.message):
            self.phase, self.message = phase, message
            self.changed()

    def _clean(self) -> None:
        shutil.rmtree(self.folders.own, ignore_errors=True)
        shutil.rmtree(self.folders.short, ignore_errors=True)
        shutil.rmtree(self.folders.temporary, ignore_errors=True)
        self.folders.socket.unlink(missing_ok=True)
