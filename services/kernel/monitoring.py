"""The port for machines that watch: /metrics for Prometheus, /healthz and /readyz for a supervisor.

Of processes of which one is called at a time, /readyz is that of a load balancer, which is to find that one. A
supervisor that starts and replaces them asks /readyz?standbyok=true, where one that stands by is well too.
"""

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


Reasons = Callable[[], Mapping[str, str]]


def build_app(reasons: Reasons, faults: Reasons) -> "web.Application":
    """The application; `reasons` gives for each component why it is not ready, empty when it is, and `faults` the same
    without those that only stand by."""
    from aiohttp import web

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def healthz(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(request: web.Request) -> web.Response:
        components = {name: reason or "ready" for name, reason in reasons().items()}
        standby_ok = request.query.get("standbyok") == "true"
        ready = not any((faults() if standby_ok else reasons()).values())
        return web.json_response({"ready": ready, "components": components}, status=200 if ready else 503)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/livez", healthz)
    app.router.add_get("/readyz", readyz)
    return app


def listen(address: str, reasons: Reasons, faults: Reasons) -> AbstractAsyncContextManager[str]:
    """Serve the application at `address` while inside; see `sites.serve_app`."""
    return serve_app(build_app(reasons, faults), address, setting="metrics_listen")
