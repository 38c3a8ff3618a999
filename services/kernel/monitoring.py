"""The port for machines that watch: /metrics for Prometheus, /healthz and /readyz for a supervisor."""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, generate_latest

from services.kernel.sites import serve_app

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


def listen(address: str, reasons: Callable[[], Mapping[str, str]]) -> AbstractAsyncContextManager[str]:
    """Serve the application at `address` while inside; see `sites.serve_app`."""
    return serve_app(build_app(reasons), address, setting="metrics_listen")
