"""Components, and `serve`, which runs them: one server, one set of loops, one way to start and to end."""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from grpc import aio

from ekiben.errors import EkibenError
from services.kernel import monitoring, telemetry
from services.kernel.audit import Writer
from services.kernel.clock import SYSTEM, Clock
from services.kernel.endings import NotStarted, run, settled
from services.kernel.identity import Auditor, Authenticator, ServiceTokenAuthenticator, read_service_token
from services.kernel.interceptors import CallInterceptor
from services.kernel.peers import Peers, RemoteAuditor, RemoteAuthenticator, open_peers, with_no_call
from services.kernel.server import Health, bind, build_server
from services.kernel.settings import PeerSettings, ServerSettings, SettingsError, load

log = logging.getLogger(__name__)

S = TypeVar("S")

# How often readiness is asked: seldom once a component was ready, often while somebody waits for the start.
_READINESS_S, _STARTING_S = 1.0, 0.05
# How often it is looked whether this process is the one to be called, which asks nobody anything.
_CHOICE_S = 0.2


async def _always_ready() -> None:
    pass


@dataclass(frozen=True)
class Servicer:
    """One gRPC service: its full name, the generated function that adds it, and what answers its methods."""

    service: str
    add: Callable[[Any, aio.Server], None]
    instance: object


@dataclass(frozen=True)
class Component:
    """A service of the suite, opened: what `serve` needs to run it."""

    name: str
    """"registry"; also its name in grpc.health.v1, and the service that its spans show."""
    servicers: Sequence[Servicer] = ()
    loops: Sequence[Callable[[], Awaitable[None]]] = ()
    """Each runs until cancelled; one that raises or returns ends the process with its error."""
    ready: Callable[[], Awaitable[None]] = _always_ready
    """Raises an EkibenError whose sentence says why, while not ready."""
    standby: Callable[[], str] | None = None
    """Of a component that several processes have and one is called at a time: why this one is not, empty while it is.
    Where there is none, any process will do."""
    authenticator: Authenticator | None = None
    """The registry's own; without one in the process the registry is asked, with a cache of five seconds."""
    auditor: Auditor | None = None
    drain: Callable[[], Awaitable[None]] | None = None
    """Called at shutdown after not-ready was told, while the loops still run."""


class Readiness:
    """Polls every component and tells health; remembers the sentence of each that is not ready."""

    def __init__(self, components: Sequence[Component], health: Health) -> None:
        self._components = components
        self._health = health
        self.reasons: dict[str, str] = {component.name: "It is starting." for component in components}
        """Why each is not ready to be called, empty when it is."""
        self.faults = dict(self.reasons)
        """The same, but one that stands by for another process has no fault."""
        self.stopping = False

    async def run(self) -> None:
        """Poll for ever: each component by itself, so that one which hangs makes no news of another late."""
        async with asyncio.TaskGroup() as group:
            for component in self._components:
                group.create_task(self._follow(component))
                if component.standby is not None:
                    group.create_task(self._choose(component.name, component.standby))

    async def _follow(self, component: Component) -> None:
        interval_s = _STARTING_S
        while True:
            with with_no_call():
                reason = await self._reason(component)
            await self._tell(component, reason)
            if not reason:
                interval_s = _READINESS_S
            await asyncio.sleep(interval_s)

    async def _choose(self, component: str, standby: Callable[[], str]) -> None:
        while True:
            await self._health.choose(component, not standby())
            await asyncio.sleep(_CHOICE_S)

    async def _tell(self, component: Component, fault: str) -> None:
        if self.stopping:
            return
        self.faults[component.name] = fault
        reason = fault or (component.standby() if component.standby is not None else "")
        if bool(reason) != bool(self.reasons[component.name]):
            message = "component is not ready" if reason else "component is ready"
            log.info(message, extra={"component": component.name, **({"reason": reason} if reason else {})})
        self.reasons[component.name] = reason
        await self._health.set(component.name, not reason)
        await self._health.set_all(not any(self.reasons.values()))

    async def stop(self) -> None:
        """Not ready from now on."""
        self.stopping = True
        self.reasons = {component.name: "It is stopping." for component in self._components}
        self.faults = dict(self.reasons)
        await self._health.stop()

    async def _reason(self, component: Component) -> str:
        try:
            with telemetry.component(component.name):
                async with asyncio.timeout(5):
                    await component.ready()
        except EkibenError as exc:
            return exc.message
        except TimeoutError:
            return "Its readiness check does not answer."
        except Exception:
            log.exception("readiness check failed", extra={"component": component.name})
            return "Its readiness check failed; the log says why."
        return ""


async def serve(
    components: Sequence[AbstractAsyncContextManager[Component]],
    settings: ServerSettings,
    *,
    name: str = "ekiben",
    started: Callable[[], Awaitable[None]] | None = None,
    peers: Peers | None = None,
    authenticator: Authenticator | None = None,
    auditor: Auditor | None = None,
    listening: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    clock: Clock = SYSTEM,
) -> None:
    """Run components until SIGTERM, SIGINT or SIGHUP (unless ignored); returns after an orderly end.

    Opened in order, closed in reverse; what is made meanwhile, files and sockets, is for this user only. At the end:
    not-ready is told, each `drain` runs in reverse order, loops are cancelled, response streams are ended, calls get
    `settings.grace_s` to finish. A second signal cuts that short.

    Args:
        name: `service.name` of this process's spans; a component's code adds its own.
        started: awaited once the server listens, before readiness is known.
        peers: where tokens are checked and audit entries go, when no component does that itself; without it
            they are opened from the environment (`EKIBEN_PEERS_…`).
        authenticator, auditor: instead of the components' own and of the registry's.
        listening: told the address, with the port that was taken.
        stop: set it to end as a signal does; for tests and embedding.

    Raises:
        SettingsError: the address cannot be listened on, or a file of the settings cannot be read.
        NotStarted: a component cannot be opened, and says why.
        BaseExceptionGroup: a loop died; its error is inside.
    """
    async with AsyncExitStack() as stack:
        opened: list[Component] = []
        # Whatever the folders above: databases hold predictions, and whoever reaches a socket gives orders.
        stack.callback(os.umask, os.umask(0o077))
        spans = telemetry.setup(name, settings)
        stack.push_async_callback(spans.close)
        stop = stop or asyncio.Event()
        _catch_signals(stop, stack)
        for unopened in components:
            try:
                opened.append(await stack.enter_async_context(unopened))
            except EkibenError as exc:
                raise NotStarted(f"It cannot start. {exc.message}") from exc
            except OSError as exc:
                raise NotStarted(f"It cannot start: {exc}.") from exc
        authenticator = authenticator or next((c.authenticator for c in opened if c.authenticator), None)
        auditor = auditor or next((c.auditor for c in opened if c.auditor), None)
        loops: list[tuple[str, Callable[[], Awaitable[None]]]] = [(c.name, loop) for c in opened for loop in c.loops]
        if authenticator is None or auditor is None:
            if peers is None:
                peers = await stack.enter_async_context(
                    open_peers(load(PeerSettings, "EKIBEN_PEERS"), caller=opened[0].name if opened else "unknown")
                )
            authenticator = authenticator or RemoteAuthenticator(peers.registry, clock)
            if auditor is None:
                auditor = remote = RemoteAuditor(peers.registry, clock)
                stack.push_async_callback(remote.close)
                loops.append(("", remote.run))
        writer = Writer(auditor, clock)
        stack.push_async_callback(writer.finish)
        tokens = ServiceTokenAuthenticator(read_service_token(settings.service_token_file), authenticator)
        owners = {servicer.service: component.name for component in opened for servicer in component.servicers}
        interceptor = CallInterceptor(tokens, writer, owners)
        health = Health(
            {c.name: [servicer.service for servicer in c.servicers] for c in opened},
            chosen={c.name for c in opened if c.standby is not None},
        )
        await health.start()
        server = build_server(interceptor, health, owners)
        for component in opened:
            for servicer in component.servicers:
                servicer.add(servicer.instance, server)
        address = bind(server, settings)
        await server.start()
        stack.push_async_callback(_stop_server, server, interceptor, settings.grace_s)
        readiness = Readiness(opened, health)
        if settings.metrics_listen:
            watched = monitoring.listen(settings.metrics_listen, lambda: readiness.reasons, lambda: readiness.faults)
            await stack.enter_async_context(watched)
        log.info("listening", extra={"address": address, "components": ",".join(c.name for c in opened)})
        if listening is not None:
            listening(address)
        settled()
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(_run_loop(owner, loop)) for owner, loop in loops]
            running.append(group.create_task(_run_loop("", readiness.run)))
            if started is not None:
                await started()
            await stop.wait()
            log.info("stopping")
            await readiness.stop()
            for component in reversed(opened):
                await _drain(component)
            await health.end()
            for task in running:
                task.cancel()
        await spans.flush()
    log.info("stopped")


async def _run_loop(owner: str, loop: Callable[[], Awaitable[None]]) -> None:
    with telemetry.component(owner), with_no_call():
        await loop()
    raise RuntimeError(f"A loop of {owner or 'the kernel'} returned: {loop!r}. Loops run until they are cancelled.")


async def _drain(component: Component) -> None:
    if component.drain is None:
        return
    try:
        with telemetry.component(component.name), with_no_call():
            await component.drain()
    except Exception:
        # The others must drain all the same.
        log.exception("drain failed", extra={"component": component.name})


async def _stop_server(server: aio.Server, interceptor: CallInterceptor, grace_s: float) -> None:
    interceptor.stop_streams()
    await server.stop(grace_s)


def _catch_signals(stop: asyncio.Event, stack: AsyncExitStack) -> None:
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()

    def caught() -> None:
        if stop.is_set() and main is not None:
            main.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup: the terminal may close
        try:
            loop.add_signal_handler(number, caught)
        except (ValueError, RuntimeError):
            return  # not in the main thread: a test, which sets `stop`
        stack.callback(loop.remove_signal_handler, number)


def run_service(
    name: str, open_component: Callable[[S, Peers], AbstractAsyncContextManager[Component]], settings_type: type[S]
) -> None:
    """All that the `__main__` of a service does: settings from the environment, then `serve` until a signal.

    Reads `EKIBEN_<NAME>_…`, `EKIBEN_SERVER_…` and `EKIBEN_PEERS_…`; faults of all three are told at once. How the
    process ends: `endings.run`.
    """
    faults: list[str] = []

    def take(cls: type[Any], prefix: str) -> Any:
        try:
            return load(cls, prefix)
        except SettingsError as exc:
            faults.extend(exc.faults)
            return None

    own = take(settings_type, f"EKIBEN_{name.upper()}")
    server = take(ServerSettings, "EKIBEN_SERVER")
    peers = take(PeerSettings, "EKIBEN_PEERS")

    async def main() -> None:
        if faults:
            raise SettingsError(faults)
        async with open_peers(peers, caller=name) as opened:
            await serve([open_component(own, opened)], server, name=name, peers=opened)

    run(main())
