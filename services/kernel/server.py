"""The grpc.aio server: limits, keepalive, TLS, health, reflection."""

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import grpc
from grpc import aio
from grpc_health.v1 import _async, health_pb2, health_pb2_grpc

from ekiben.channel import MAX_MESSAGE_BYTES
from services.kernel import reflecting
from services.kernel.settings import ServerSettings, SettingsError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# The kernel's limit of a socket's path, less the terminating zero (sun_path in unix(7)).
_MAX_PATH = 107


class Health:
    """What grpc.health.v1 says: for each component, for each of its services, and for the whole as "".

    Services say what their component does, but those of `chosen` components, of which one process of several is to be
    called: they say whether this is the one, and go on to say it while it ends, since it is called until another is.
    """

    def __init__(self, services: Mapping[str, Iterable[str]], chosen: Collection[str] = ()) -> None:
        self.servicer = _async.HealthServicer()
        self._services = {component: tuple(names) for component, names in services.items()}
        self._chosen = chosen
        self._stopping = False
        self._last: dict[str, int] = {}

    async def start(self) -> None:
        """Say NOT_SERVING everywhere until told better."""
        for component, services in self._services.items():
            for name in (component, *services):
                await self._say(name, False)
        await self._say("", False)

    async def set(self, component: str, ready: bool) -> None:
        """Tell of one component."""
        for name in self._names(component):
            if not self._stopping:
                await self._say(name, ready)

    async def set_all(self, ready: bool) -> None:
        """Tell of the whole."""
        if not self._stopping:
            await self._say("", ready)

    async def choose(self, component: str, here: bool) -> None:
        """Tell whether this process of a chosen component is the one to be called."""
        for name in self._services[component]:
            await self._say(name, here)

    async def stop(self) -> None:
        """Say NOT_SERVING from now on, whatever is set; not of what is chosen."""
        self._stopping = True
        for name in ("", *(name for component in self._services for name in self._names(component))):
            await self._say(name, False)

    async def end(self) -> None:
        """Say NOT_SERVING of all from now on."""
        await self.servicer.enter_graceful_shutdown()

    def _names(self, component: str) -> tuple[str, ...]:
        return (component, *(() if component in self._chosen else self._services[component]))

    async def _say(self, name: str, ready: bool) -> None:
        status = SERVING if ready else NOT_SERVING
        if self._last.get(name) != status:
            self._last[name] = status
            await self.servicer.set(name, status)


def build_server(interceptor: aio.ServerInterceptor, health: Health, services: Iterable[str]) -> aio.Server:  # type: ignore[type-arg]
    """A server with health and reflection of `services`, yet without an address."""
    server = aio.server(
        interceptors=[interceptor],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", 32 << 10),
            ("grpc.absolute_max_metadata_size", 64 << 10),
            # A second server on the same port is a mistake to be told, not half of the connections.
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    reflecting.add((*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server)
    return server


def bind(server: aio.Server, settings: ServerSettings) -> str:
    """Let `server` listen where `settings` say; returns the address to dial, with the port that was taken.

    Raises:
        SettingsError: the address is taken or is none, or a TLS file cannot be read.
    """
    address = settings.listen
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        if len(os.fsencode(path)) > _MAX_PATH:
            raise SettingsError([f"listen: the socket's path {path} is longer than {_MAX_PATH} bytes."])
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()  # left by a killed process; whoever must be alone here holds a lock of its own
        _add(server, address, None)
        path.chmod(0o600)
        return address
    port = _add(server, address, _credentials(settings))
    return f"{address.rpartition(':')[0]}:{port}"


def _add(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        raise SettingsError([f"listen: cannot listen on {address}: is it in use, or none of this machine?"]) from exc


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    try:
        chain = (settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())
        roots = settings.tls_client_ca_file.read_bytes() if settings.tls_client_ca_file else None
    except OSError as exc:
        raise SettingsError([f"tls: {exc}."]) from exc
    return grpc.ssl_server_credentials([chain], root_certificates=roots, require_client_auth=roots is not None)
