"""A command in a pod as a session: by `exec` in the bento's container, or in an ephemeral container beside it.

The API server's WebSocket carries channels, each message beginning with a byte that says which. With the protocol
`v5.channel.k8s.io` the end of input can be told; clusters have it since 1.30.

Source: kubernetes.io/docs/reference/using-api/api-concepts, "WebSockets"; k8s.io/apimachinery/pkg/util/remotecommand.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from ekiben.errors import EkibenError, FailedPrecondition, Unavailable
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.names import CONTAINER, Object
from services.deployer.runtimes.serving import USER
from services.deployer.runtimes.sessions import SHELL, STDERR, STDOUT, ExecSpec, Session
from services.deployer.runtimes.starting import not_running
from services.kernel.clock import Clock

_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_DEBUG_STARTS_S = 120.0
"""An image may have to be pulled first."""
_LOOK_S = 0.1
"""How often the watched pod is looked at: what a person takes for at once."""
_HANGUP_S = 5.0
"""How long it may take to tell processes that they are hung up; then that goes on without us."""
_MARK = "EKIBEN_TERMINAL"
"""Variable by which what was started in a terminal, and all that this started, is found again."""
_MARKED = (
    "python",
    "-ISc",
    f"""
import os, signal, sys
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what is executed would too.
os.environ["{_MARK}"] = sys.argv[1]
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{{sys.argv[2]}}: {{error.strerror}}", file=sys.stderr)
    sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
""",
)
"""By Python, which the image of a bento has, whatever else it lacks."""
_HANG_UP = (
    "python",
    "-ISc",
    f"""
import os, signal, sys, time
def each(number):
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{{process}}/environ", "rb") as file:
                if b"{_MARK}=" + os.fsencode(sys.argv[1]) in file.read().split(b"\\0"):
                    os.kill(int(process), number)
        except OSError:
            pass
each(signal.SIGHUP)
print("told", flush=True)
time.sleep(2)
each(signal.SIGKILL)
""",
)
"""Kubernetes ends no process whose connection is gone, not this script either: nobody needs to wait for it."""


class PodSession:
    """See the module."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, tty: bool) -> None:
        self.exit_code: int | None = None
        self.fault = ""
        """Why it could not be run, in the cluster's words."""
        self._socket, self._tty, self._input_ended = socket, tty, False

    async def send(self, data: bytes) -> None:
        """See Session."""
        if not self._input_ended:
            await self._write(_STDIN, data)

    async def end_input(self) -> None:
        """See Session."""
        if self._tty:
            await self._write(_STDIN, b"\x04")
        elif not self._input_ended:
            self._input_ended = True
            await self._write(_CLOSE, bytes([_STDIN]))

    async def resize(self, columns: int, rows: int) -> None:
        """See Session."""
        if self._tty:
            await self._write(_RESIZE, json.dumps({"Width": columns, "Height": rows}).encode())

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """See Session."""
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel in (_STDOUT, _STDERR) and data:
                yield (STDOUT if channel == _STDOUT else STDERR), data
            elif channel == _ERROR:
                self.exit_code, self.fault = ended(json.loads(data))
        if self.exit_code is None and not self.fault:
            raise Unavailable("The way to the pod was lost.", reason="TERMINAL_LOST")
        if self.fault:
            raise FailedPrecondition(f"The command cannot be run: {self.fault}", reason="EXEC_FAILED")

    async def _write(self, channel: int, data: bytes) -> None:
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # It has ended; `output` says how.
            await self._socket.send_bytes(bytes([channel]) + data)


class LoggedSession:
    """A command in an ephemeral container without a TTY. Its output is read from its log, which does not say what was
    standard error: whoever attaches comes too late for what was printed before."""

    def __init__(
        self, input: PodSession | None, lines: AsyncIterator[bytes], ended: Callable[[], Awaitable[int]]
    ) -> None:
        self.exit_code: int | None = None
        self._input, self._lines, self._ended = input, lines, ended

    async def send(self, data: bytes) -> None:
        """See Session."""
        if self._input is not None:
            await self._input.send(data)

    async def end_input(self) -> None:
        """See Session."""
        if self._input is not None:
            await self._input.end_input()

    async def resize(self, columns: int, rows: int) -> None:
        """See Session."""

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """See Session."""
        async for line in self._lines:
            yield STDOUT, line.partition(b" ")[2] + b"\n"
        self.exit_code = await self._ended()


@asynccontextmanager
async def run(api: Api, spec: ExecSpec, pod_of: Callable[[], Object | None], clock: Clock) -> AsyncIterator[Session]:
    """A command in a pod while inside. `pod_of` gives the pod as it is now, None once it is gone; it costs no call."""
    pod = pod_of()
    if pod is None or (pod.get("status") or {}).get("phase") != "Running":
        raise not_running(spec.replica)
    if not spec.debug_image:
        if "running" not in _state(pod, "containerStatuses", CONTAINER):
            raise not_running(spec.replica)
        async with _connected(api, spec, "exec", [("container", CONTAINER), *_words(spec)]) as session:
            async with _hung_up(api, spec, session):
                yield session
        return
    await api.debug(spec.replica, debugger(spec))
    state = await _until(spec, pod_of, clock, ("running", "terminated"))

    async def ended() -> int:
        return int((await _until(spec, pod_of, clock, ("terminated",)))["terminated"].get("exitCode") or 0)

    log = api.log(spec.replica, spec.name, tail=-1, follow=True)
    if "terminated" in state:
        yield LoggedSession(None, log, ended)
    elif spec.tty:
        async with _connected(api, spec, "attach", [("container", spec.name)]) as session:
            attached = _Attached(session, ended)
            async with _hung_up(api, spec, attached):
                yield attached
    else:
        async with contextlib.AsyncExitStack() as stack:
            input: PodSession | None = None
            with contextlib.suppress(EkibenError):  # It has just ended.
                input = await stack.enter_async_context(_input_of(api, spec))
            logged = LoggedSession(input, log, ended)
            async with _hung_up(api, spec, logged):
                yield logged


class _Attached:
    """A TTY of an ephemeral container: the connection does not say how its command ended, the pod does."""

    def __init__(self, session: PodSession, ended: Callable[[], Awaitable[int]]) -> None:
        self.exit_code: int | None = None
        self.send, self.end_input, self.resize = session.send, session.end_input, session.resize
        self._session, self._ended = session, ended

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """See Session."""
        async for piece in self._session.output():
            yield piece
        self.exit_code = await self._ended()


@asynccontextmanager
async def _input_of(api: Api, spec: ExecSpec) -> AsyncIterator[PodSession]:
    async with api.connected(spec.replica, "attach", [("container", spec.name), ("stdin", "true")]) as socket:

        async def listen() -> None:
            async for _ in socket:  # The server's own heartbeats are answered only while somebody listens.
                pass

        listening = asyncio.create_task(listen())
        try:
            yield PodSession(socket, tty=False)
        finally:
            listening.cancel()
            await asyncio.wait([listening])


@asynccontextmanager
async def _connected(api: Api, spec: ExecSpec, verb: str, query: list[tuple[str, str]]) -> AsyncIterator[PodSession]:
    streams = [("stdin", "true"), ("stdout", "true"), ("stderr", "false" if spec.tty else "true")]
    async with api.connected(spec.replica, verb, [*query, *streams, ("tty", str(spec.tty).lower())]) as socket:
        session = PodSession(socket, spec.tty)
        if spec.columns:
            await session.resize(spec.columns, spec.rows)
        yield session


@asynccontextmanager
async def _hung_up(api: Api, spec: ExecSpec, session: Session) -> AsyncIterator[None]:
    """Hang up what runs in the session, and all that it started, where it is left before its end: from the replica's
    own container, which sees a debug container's processes too."""
    try:
        yield
    finally:
        if session.exit_code is None:
            query = [("container", CONTAINER), *[("command", word) for word in (*_HANG_UP, spec.name)]]
            streams = [("stdout", "true"), ("stderr", "false"), ("stdin", "false"), ("tty", "false")]
            with contextlib.suppress(EkibenError, TimeoutError):  # With a replica that is gone all of it is.
                async with (
                    asyncio.timeout(_HANGUP_S),
                    api.connected(spec.replica, "exec", [*query, *streams]) as socket,
                ):
                    async for message in socket:
                        if message.type is aiohttp.WSMsgType.BINARY and message.data[1:]:
                            break


def _words(spec: ExecSpec) -> list[tuple[str, str]]:
    return [("command", word) for word in (*_MARKED, spec.name, *(spec.command or SHELL))]


async def _until(
    spec: ExecSpec, pod_of: Callable[[], Object | None], clock: Clock, wanted: Collection[str]
) -> Mapping[str, Any]:
    """The state of the ephemeral container, once it is one of these.

    Raises:
        FailedPrecondition: it cannot be started, not in time, or the pod is gone (EXEC_FAILED).
    """
    end = clock.monotonic() + _DEBUG_STARTS_S
    state: Mapping[str, Any] = {}
    while (pod := pod_of()) is not None and clock.monotonic() < end:
        state = _state(pod, "ephemeralContainerStatuses", spec.name)
        if any(name in state for name in wanted):
            return state
        waiting = state.get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            break  # Kubelet tries again; whoever waits wants to know why it has to.
        await clock.sleep(_LOOK_S)
    said = (state.get("waiting") or {}).get("message") or "it did not start in time"
    raise FailedPrecondition(
        f"The container of {spec.debug_image} cannot be started beside the replica: "
        f"{said if pod is not None else 'the replica is gone'}",
        reason="EXEC_FAILED",
    )


def debugger(spec: ExecSpec) -> Object:
    """The ephemeral container: as the restricted security standard has it, with the replica's processes in sight."""
    return {
        "name": spec.name,
        "image": spec.debug_image,
        **({"command": list(spec.command)} if spec.command else {}),
        "stdin": True,
        "stdinOnce": True,
        "env": [{"name": _MARK, "value": spec.name}],
        "tty": spec.tty,
        "targetContainerName": CONTAINER,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def ended(status: Mapping[str, Any]) -> tuple[int | None, str]:
    """The exit status that the error channel tells, or why there is none."""
    if status.get("status") == "Success":
        return 0, ""
    causes = (status.get("details") or {}).get("causes") or ()
    for cause in causes:
        if cause.get("reason") == "ExitCode":
            return int(cause.get("message") or 1), ""
    return None, str(status.get("message") or "no reason was given")


def _state(pod: Object, kind: str, name: str) -> Mapping[str, Any]:
    statuses = (pod.get("status") or {}).get(kind) or ()
    found: Mapping[str, Any] = next((each.get("state") or {} for each in statuses if each["name"] == name), {})
    return found
