"""The port for machines that watch: /metrics for Prometheus, /healthz and /readyz for a supervisor."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, generate_latest

from services.kernel.settings import SettingsError

if TYPE_CHECKING:
    from aiohttp import web


def render() -> bytes:
    """All metrics of this process, in Prometheus' text format."""
    return generate_latest(REGISTRY)


def build_app(reasons: Callable[[], Mapping[str, str]]) -> "web.Application":
    """The application; `reasons` gives for each component why it is not ready, empty when it is."""
    from aiohttp import web

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def healthz(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_request: web.Request) -> web.Response:
        components = {name: reason or "ready" for name, reason in reasons().items()}
        ready = not any(reasons().values())
        return web.json_response({"ready": ready, "components": components}, status=200 if ready else 503)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/livez", healthz)
    app.router.add_get("/readyz", readyz)
    return app


@asynccontextmanager
async def listen(address: str, reasons: Callable[[], Mapping[str, str]]) -> AsyncIterator[None]:
    """Serve the application at `host:port` or `unix:/path` while inside.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    from aiohttp import web

    runner = web.AppRunner(build_app(reasons), access_log=None)
    await runner.setup()
    try:
        site: web.BaseSite
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            site = web.UnixSite(runner, str(path))
        else:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise SettingsError([f"metrics_listen: {address!r} is neither host:port nor unix:/path."])
            site = web.TCPSite(runner, host.strip("[]"), int(port))
        try:
            await site.start()
        except OSError as exc:
            raise SettingsError([f"metrics_listen: cannot listen on {address}: {exc.strerror or exc}."]) from exc
        yield
    finally:
        await runner.cleanup()
