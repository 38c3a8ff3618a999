"""A proxy in front of a real cluster's API: it counts what is asked, and cuts it off when it is told to."""

import asyncio
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from kubernetes_asyncio import client, config

HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "host", "content-encoding", "accept-encoding"}
_KIND = re.compile(r"/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/[^/]+)?/([a-z]+)(?:/[^/]+(?:/([a-z]+))?)?")


def operation(request: web.Request) -> str:
    """What is asked: `watch pods`, `list secrets`, `apply deployments`, `delete services`, …"""
    found = _KIND.fullmatch(request.path)
    kind = "other" if found is None else "/".join(each for each in found.groups() if each)
    one = found is not None and request.path.rstrip("/").rpartition("/")[2] != found[1]
    if request.method == "GET":
        verb = "watch" if request.query.get("watch") == "true" else "get" if one else "list"
    else:
        verb = {"PATCH": "apply", "DELETE": "delete", "POST": "create", "PUT": "update"}[request.method]
    return f"{verb} {kind}"


@dataclass
class ApiProxy:
    """The proxy. `choose` says what goes wrong with a request, given what it asks and how many such there were:
    `cut`, the connection ends before it is passed on; `after:cut`, after it was carried out."""

    server: str
    kubeconfig: Path
    choose: Callable[[str, int], str] = lambda operation, count: ""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by operation."""
    sent_bytes: int = 0
    """Bodies to the server."""
    received_bytes: int = 0
    """Bodies of the server's answers."""
    _session: aiohttp.ClientSession | None = None
    _open: set[asyncio.Transport] = field(default_factory=set)
    _away: bool = False

    def away(self, is_away: bool) -> None:
        """Let the API be away, or there again: what is open is cut off, what comes is refused."""
        self._away = is_away
        if is_away:
            for transport in list(self._open):
                transport.abort()

    def calls(self) -> Counter[str]:
        """Requests so far, watches left out."""
        return Counter({name: count for name, count in self.seen.items() if not name.startswith("watch ")})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one request on, or not."""
        assert self._session is not None and request.transport is not None
        transport: Any = request.transport
        self._open.add(transport)
        try:
            name = operation(request)
            body = await request.read()
            if self._away:
                self._cut(transport)
            self.seen[name] += 1
            fault = self.choose(name, self.seen[name])
            if fault == "cut":
                self._cut(transport)
            self.sent_bytes += len(body)
            headers = [(key, value) for key, value in request.headers.items() if key.lower() not in HOP]
            async with self._session.request(
                request.method, f"{self.server}{request.raw_path}", headers=headers, data=body or None
            ) as answer:
                kept = {key: value for key, value in answer.headers.items() if key.lower() not in HOP}
                response = web.StreamResponse(status=answer.status, headers=kept)
                if fault == "after:cut":
                    await answer.read()
                    self._cut(transport)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    self.received_bytes += len(chunk)
                    await response.write(chunk)
                await response.write_eof()
                return response
        finally:
            self._open.discard(transport)

    @staticmethod
    def _cut(transport: asyncio.Transport) -> None:
        transport.abort()
        raise asyncio.CancelledError  # what aiohttp takes for a client that went away


@asynccontextmanager
async def api_proxy(kubeconfig: Path, folder: Path) -> AsyncIterator[ApiProxy]:
    """A proxy that does nothing wrong until it is told to; its kubeconfig is written to the folder."""
    settings = client.Configuration()
    await config.load_kube_config(str(kubeconfig), client_configuration=settings)
    trust = ssl.create_default_context(cafile=settings.ssl_ca_cert)
    if not settings.verify_ssl:
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    if settings.cert_file:
        trust.load_cert_chain(settings.cert_file, settings.key_file)
    token = {"Authorization": settings.api_key["BearerToken"]} if settings.api_key else {}
    proxy = ApiProxy(settings.host, folder / "proxy.kubeconfig")
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{rest:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    connector = aiohttp.TCPConnector(ssl=trust, limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=token) as session:
        proxy._session = session
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            proxy.kubeconfig.write_text(
                yaml.safe_dump(
                    {
                        "apiVersion": "v1",
                        "kind": "Config",
                        "clusters": [{"name": "proxy", "cluster": {"server": f"http://{host}:{port}"}}],
                        "users": [{"name": "proxy", "user": {}}],
                        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
                        "current-context": "proxy",
                    }
                )
            )
            yield proxy
        finally:
            await runner.cleanup()
