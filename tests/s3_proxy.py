"""A proxy in front of a real S3 server that goes wrong in the ways that networks and servers do."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

from tests.s3 import S3Server

HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "expect", "date", "server"}


def operation(request: web.Request) -> str:
    """What is asked of S3: `GetObject`, `UploadPart`, …"""
    query, method = request.query, request.method
    if "uploadId" in query:
        return {"PUT": "UploadPart", "POST": "Complete", "DELETE": "Abort", "GET": "ListParts"}[method]
    if "uploads" in query:
        return "Start" if method == "POST" else "ListUploads"
    if method == "GET" and "list-type" in query:
        return "List"
    return {"PUT": "Put", "GET": "Get", "HEAD": "Head", "DELETE": "Delete"}[method]


@dataclass
class FaultyS3:
    """The proxy. `choose` says what goes wrong with a request: the name of a fault, or nothing.

    Faults: a status (`500`, `503`, `507`) instead of passing the request on; `after:500`, that status after it was carried out;
    `cut`, the connection ends before; `after:cut`, it ends after it was carried out; `after:hang`, no answer after it was
    carried out; `half`, half of the answer's body; `half:request`, half of the request's body, then the end.
    """

    server: S3Server
    endpoint: str = ""
    choose: Callable[[str, int], str] = lambda operation, count: ""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by operation, also those that went wrong."""
    faults: Counter[str] = field(default_factory=Counter)
    """What went wrong, by operation and fault."""
    _session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one request on, or not."""
        name = operation(request)
        self.seen[name] += 1
        fault = self.choose(name, self.seen[name])
        self.faults[f"{name} {fault}"] += bool(fault)
        when, _, what = fault.rpartition(":") if fault.startswith("after:") else ("", "", fault)
        body = await request.read()
        if fault == "half:request":
            await self._half(request, body)
        if fault and not when and what != "half":
            return self._go_wrong(request, what)
        status, headers, answer = await self._ask(request, body)
        if when and what == "hang":
            await asyncio.sleep(3600)
        if when:
            return self._go_wrong(request, what)
        if what == "half" and len(answer) > 1:
            response = web.StreamResponse(status=status, headers=headers)
            response.content_length = len(answer)
            await response.prepare(request)
            await response.write(answer[: len(answer) // 2])
            return self._cut(request)
        if request.method == "HEAD":
            response = web.StreamResponse(status=status, headers=headers)
            await response.prepare(request)
            return response
        return web.Response(status=status, headers=headers, body=answer)

    async def _ask(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        assert self._session is not None
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP]
        url = URL(f"{self.server.endpoint}{request.raw_path}", encoded=True)
        # The host that was signed is the proxy's, and goes on as it is.
        async with self._session.request(request.method, url, headers=headers, data=body or None) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
            if request.method == "HEAD" and "Content-Length" in answer.headers:
                kept["Content-Length"] = answer.headers["Content-Length"]
            return answer.status, kept, await answer.read()

    async def _half(self, request: web.Request, body: bytes) -> None:
        """Let the server see a request whose client dies within its body."""
        at = URL(self.server.endpoint)
        _, writer = await asyncio.open_connection(at.host, at.port)
        head = [f"{request.method} {request.raw_path} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in request.headers.items()]
        writer.write("\r\n".join([*head, "", ""]).encode() + body[: len(body) // 2])
        await writer.drain()
        writer.close()

    def _go_wrong(self, request: web.Request, what: str) -> web.StreamResponse:
        if not what.isdigit():
            return self._cut(request)
        code = {"500": "InternalError", "503": "SlowDown", "507": "InsufficientStorage"}[what]
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        return web.Response(
            status=int(what), text="" if request.method == "HEAD" else text, content_type="application/xml"
        )

    @staticmethod
    def _cut(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise asyncio.CancelledError  # what aiohttp takes for a client that went away


@asynccontextmanager
async def faulty_s3(server: S3Server) -> AsyncIterator[FaultyS3]:
    """A proxy that does nothing wrong until it is told to."""
    proxy = FaultyS3(server)
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
            proxy.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield proxy
        finally:
            await runner.cleanup()
