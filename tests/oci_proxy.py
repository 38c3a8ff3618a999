"""A proxy in front of a real OCI registry that goes wrong in the ways that networks and registries do.

Bodies stream through it, both ways, so that an upload which is cut leaves at the registry what had come through.
"""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

from tests.oci_registry import OciRegistry

HOP = {"connection", "transfer-encoding", "keep-alive", "expect", "date", "server"}


def operation(request: web.Request) -> str:
    """What is asked: `GET blob`, `POST uploads`, `PATCH upload`, `PUT manifest`, …"""
    kinds = {
        r"/blobs/uploads/$": "uploads",
        r"/blobs/uploads/[^/]+$": "upload",
        r"/blobs/[^/]+$": "blob",
        r"/manifests/[^/]+$": "manifest",
        r"/tags/list$": "tags",
        r"/referrers/[^/]+$": "referrers",
    }
    kind = next((name for pattern, name in kinds.items() if re.search(pattern, request.path)), "ping")
    if kind == "uploads" and "mount" in request.query:
        kind = "mount"
    return f"{request.method} {kind}"


@dataclass
class FaultyRegistry:
    """The proxy. `choose` says what goes wrong with a request: the name of a fault, or nothing.

    Faults: a status (`500`, `503`, `429`, `429:7` with Retry-After) in place of passing it on; `after:500` and `after:cut`,
    that once it was carried out; `cut`, the connection ends; `cut:N`, it ends after N bytes of the request's body have gone
    through; `half:N`, after N bytes of the answer's; `hang`, no answer; `slow:S`, S seconds for each 64 KiB of
    either body; `move:URL`, a redirect to URL.
    """

    server: OciRegistry
    host: str = ""
    choose: Callable[[str, int], str] = lambda operation, count: ""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by operation, also those that went wrong."""
    faults: Counter[str] = field(default_factory=Counter)
    """What went wrong, by operation and fault."""
    logins: list[tuple[str, str]] = field(default_factory=list)
    """Operations, and the Authorization that came with each."""
    received: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies by operation."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the proxy ends: what hangs goes on."""
    _session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one request on, or not."""
        name = operation(request)
        self.seen[name] += 1
        self.logins.append((name, request.headers.get("Authorization", "")))
        fault = self.choose(name, self.seen[name])
        self.faults[f"{name} {fault}"] += bool(fault)
        what, _, more = fault.partition(":")
        if what.isdigit():
            await request.read()
            return self._status(int(what), more)
        if fault == "cut":
            return self._cut(request)
        if what == "hang":
            await self.released.wait()
            return self._cut(request)
        if what == "move":
            return web.Response(status=307, headers={"Location": more})
        assert self._session is not None
        headers = [(key, value) for key, value in request.headers.items() if key.lower() not in HOP]
        url = URL(f"{self.server.endpoint}{request.raw_path}", encoded=True)
        slow = float(more) if what == "slow" else 0.0
        body = self._body(request, name, int(more) if what == "cut" else None, slow) if request.can_read_body else None
        try:
            async with self._session.request(
                request.method, url, headers=headers, data=body, allow_redirects=False
            ) as answer:
                if what == "after":
                    await answer.read()
                    return self._status(int(more)) if more.isdigit() else self._cut(request)
                return await self._pass_back(request, answer, int(more) if what == "half" else None, slow)
        except (aiohttp.ClientError, ConnectionError):
            return self._cut(request)

    async def _body(self, request: web.Request, name: str, most: int | None, slow: float) -> AsyncIterator[bytes]:
        passed = 0
        async for chunk in request.content.iter_chunked(64 << 10) if slow else request.content.iter_any():
            await asyncio.sleep(slow)
            if most is not None and passed + len(chunk) > most:
                yield chunk[: most - passed]
                self.received[name] += most - passed
                await asyncio.sleep(0)
                raise ConnectionError("cut")
            passed += len(chunk)
            self.received[name] += len(chunk)
            yield chunk

    async def _pass_back(
        self, request: web.Request, answer: aiohttp.ClientResponse, most: int | None, slow: float
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in HOP:
                response.headers.add(key, value)
        await response.prepare(request)
        passed = 0
        async for chunk in answer.content.iter_chunked(64 << 10) if slow else answer.content.iter_any():
            await asyncio.sleep(slow)
            if most is not None and passed + len(chunk) > most:
                await response.write(chunk[: most - passed])
                return self._cut(request)
            passed += len(chunk)
            await response.write(chunk)
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    @staticmethod
    def _status(status: int, retry_after: str = "") -> web.StreamResponse:
        text = '{"errors": [{"code": "UNKNOWN", "message": "injected"}]}'
        headers = {"Retry-After": retry_after} if retry_after else {}
        return web.Response(status=status, text=text, content_type="application/json", headers=headers)

    @staticmethod
    def _cut(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError  # what aiohttp takes for a client that went away


@asynccontextmanager
async def faulty_registry(server: OciRegistry) -> AsyncIterator[FaultyRegistry]:
    """A proxy that does nothing wrong until it is told to."""
    proxy = FaultyRegistry(server)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{rest:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    async with aiohttp.ClientSession(
        auto_decompress=False, skip_auto_headers=["Content-Type", "User-Agent"]
    ) as session:
        proxy._session = session
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            proxy.host = f"127.0.0.1:{runner.addresses[0][1]}"
            yield proxy
        finally:
            proxy.released.set()
            await runner.cleanup()
