"""The gateway's wiring."""

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ekiben.deployer.v1 import deployer_pb2_grpc
from ekiben.errors import EkibenError, Unavailable
from ekiben.recorder.v1 import recorder_pb2_grpc
from services.content.files import write_whole
from services.gateway import listeners, messages, routes
from services.gateway.admission import Admission, serve_admission
from services.gateway.captures import CaptureLog, Captures
from services.gateway.envoy import Envoy, capture_module
from services.gateway.http import RUNNER, build_http_app
from services.gateway.metrics import Metrics
from services.gateway.settings import Settings
from services.gateway.watcher import Watcher, why_not_bindable
from services.gateway.xds import Files
from services.kernel.app import Component
from services.kernel.clock import SYSTEM, Clock
from services.kernel.identity import read_service_token
from services.kernel.peers import CHOSEN_DEPLOYER, Peers, RemoteAuthenticator
from services.kernel.settings import SettingsError
from services.kernel.sites import serve_app

_INSTEAD = {
    os.strerror(errno.EADDRINUSE): "End what listens there, or take another port; 0 takes a free one.",
    os.strerror(errno.EACCES): "Take a port from 1024 on, and let a proxy lead to it.",
}
_ELSEWHERE = "Name an address of this machine as host: 127.0.0.1, or 0.0.0.0 for all that it has."


@dataclass(frozen=True)
class GatewayComponent(Component):
    """The gateway, opened."""

    port: int = 0
    """The public port that was taken."""


@contextlib.asynccontextmanager
async def open_gateway(settings: Settings, peers: Peers, *, clock: Clock = SYSTEM) -> AsyncIterator[GatewayComponent]:
    """Everything the gateway needs, opened in order and closed in reverse.

    Envoy serves from here on, by the routes it had; an Envoy that an earlier gateway left is taken over.

    Raises:
        SettingsError: the public port cannot be bound.
        FailedPrecondition: Envoy does not start.
    """
    for folder in (settings.data_dir, settings.run_dir):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files, captures = Files(settings.envoy_dir), CaptureLog(settings.captures_dir)
    boot = listeners.bootstrap(
        admin_socket=settings.admin_socket, listeners_file=files.listeners, clusters_file=files.clusters
    )
    envoy = Envoy(settings, files, boot, clock, before_start=captures.seal)
    await envoy.adopt()
    port = _public_port(settings, adopted=envoy.adopted)
    plan = listeners.Plan(
        host=_address(settings.host),
        port=port,
        capture_log=captures.current,
        trace_percent=settings.trace_sample_percent,
        trace_cluster="recorder" if settings.recorder or peers.settings.recorder else "",
        service_token=read_service_token(settings.service_token_file or peers.settings.service_token_file),
        idle_timeout_s=settings.stream_idle_timeout_s,
        trusted_hops=settings.trusted_hops,
        capture_module=capture_module(settings.capture_with) is not None,
    )
    deployer = deployer_pb2_grpc.RoutesStub(peers.deployer)
    recorder = recorder_pb2_grpc.PredictionsStub(peers.recorder)
    watcher = Watcher(settings, plan, suite(settings, peers), files, envoy, deployer, clock)
    sender = Captures(
        captures,
        recorder,
        lambda: envoy.admin.post("/reopen_logs"),
        clock,
        segment_bytes=settings.capture_segment_bytes,
        backlog_bytes=settings.capture_backlog_bytes,
    )
    metrics = Metrics(
        lambda: watcher.table,
        lambda: envoy.admin.get("/stats/prometheus"),
        clock,
        targets=settings.metrics_targets,
        keep_s=settings.replica_metrics_interval_s,
    )
    admission = Admission(RemoteAuthenticator(peers.registry, clock))

    async def parts() -> Mapping[str, str]:
        """Why each part is not ready; empty for one that is."""
        return {"envoy": await _reason(envoy.check), "routes": await _reason(_as_async(watcher.check))}

    async def ready() -> None:
        for part, reason in (await parts()).items():
            if reason:
                raise Unavailable(f"{part}: {reason}", reason="GATEWAY_NOT_READY", part=part)

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(envoy.admin.close)
        await stack.enter_async_context(serve_admission(admission, settings.admission_socket))
        front = build_http_app(settings, peers, metrics=metrics.render, readiness=parts)
        await stack.enter_async_context(serve_app(front, settings.http_address, setting="http_listen", **RUNNER))
        await watcher.restore()
        await envoy.start()
        stack.push_async_callback(envoy.stop)
        yield GatewayComponent(
            "gateway",
            loops=[envoy.run, watcher.run, sender.run],
            ready=ready,
            drain=envoy.drain,
            port=port,
        )


def suite(settings: Settings, peers: Peers) -> list[messages.Peer]:
    """The services as Envoy dials them: by the gateway's own settings, else as the peers do."""
    known = peers.settings
    tls: dict[str, Any] = {
        "ca_file": settings.tls_ca_file or known.tls_ca_file,
        "cert_file": settings.tls_cert_file or known.tls_cert_file,
        "key_file": settings.tls_key_file or known.tls_key_file,
    }
    addresses = {
        name: getattr(settings, name) or getattr(known, name)
        for name in ("registry", "builder", "deployer", "recorder")
    }
    serving = {"deployer": CHOSEN_DEPLOYER}
    found = [
        messages.Peer(name, address, http2=True, serving=serving.get(name, ""), **tls)
        for name, address in addresses.items()
        if address
    ]
    if blobs := settings.blobs or known.blobs:
        found.append(messages.Peer(routes.BLOBS, blobs, http2=False, **tls))
    if images := settings.images or known.images:
        found.append(messages.Peer(routes.IMAGES, images, http2=False, **tls))
    found.append(messages.Peer(routes.HTTP_FRONT, settings.http_address, http2=False))
    found.append(messages.Peer(routes.ADMISSION_CLUSTER, f"unix:{settings.admission_socket}", http2=False))
    return found


def _public_port(settings: Settings, *, adopted: bool) -> int:
    """The port to listen on. One that was chosen is kept in a file, so that URLs outlive a restart."""
    kept = settings.data_dir / "port"
    port = settings.port
    if not port:
        with contextlib.suppress(OSError, ValueError):
            port = int(kept.read_text())
        if port and not adopted and why_not_bindable(settings.host, port) is not None:
            port = 0
        if not port:
            with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
                probe.bind((settings.host, 0))
                port = int(probe.getsockname()[1])
        write_whole(kept, str(port).encode(), durable=False)
    elif not adopted and (why := why_not_bindable(settings.host, port)) is not None:
        raise SettingsError([f"port: cannot listen on {settings.host}:{port}: {why}. {_INSTEAD.get(why, _ELSEWHERE)}"])
    return port


def _address(host: str) -> str:
    """Envoy binds addresses, not names."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


async def _reason(check: Callable[[], Awaitable[Any]]) -> str:
    try:
        await check()
    except EkibenError as exc:
        return exc.message
    return ""


def _as_async(check: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def checked() -> None:
        check()

    return checked
