"""HTTP/JSON for every gRPC method that the protos annotate: one handler for all of them.

A request is bound by `bindings`, read by `requests` and sent to the peer that serves its proto package, with the
caller's own token. A server stream comes back as newline-delimited JSON, one message a line, each flushed; an
error after the headers is a last line `{"error": <problem>}`.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry import trace

from ekiben.errors import NotFound
from services.gateway.bindings import PEERS, Binding, RoutingTable, read_bindings
from services.gateway.requests import read_request
from services.gateway.responses import Refusal, call_metadata, client_left, problem_of, problem_response
from services.kernel.peers import Peers

# How long a stream may wait for its first message before its headers are sent without one. Until then an error
# is still an HTTP status.
FIRST_MESSAGE_S = 1.0
# How often a silent stream looks whether its client is still there.
PRESENCE_S = 2.0


class Transcoder:
    """Answers requests below `/v1/`."""

    def __init__(self, peers: Peers, table: RoutingTable | None = None) -> None:
        self._peers = peers
        self.table = table or RoutingTable(read_bindings())
        self._methods: dict[str, Any] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The response to any request. Every error is a problem document."""
        try:
            binding, path_values = self._route(request)
            trace.get_current_span().update_name(f"{binding.verb} {binding.template.text}")
            body = await _read_body(request, binding)
            message = read_request(binding, path_values, request.rel_url.query.items(), body)
            call = self._method(binding)(message, metadata=call_metadata(request))
            if binding.streams:
                return await _stream(request, call)
            return web.Response(body=to_json(await call), content_type="application/json")
        except Exception as error:
            return problem_response(request, error)

    def _route(self, request: web.Request) -> tuple[Binding, dict[str, str]]:
        found = self.table.find(request.rel_url.raw_path)
        if not found:
            raise NotFound(
                f"There is nothing at {request.path!r}; see /docs.", reason="PATH_UNKNOWN", path=request.path
            )
        verb = "GET" if request.method == "HEAD" else request.method
        if verb not in found:
            allowed = ", ".join(sorted({*found, *(["HEAD"] if "GET" in found else [])}))
            raise Refusal(
                405, "METHOD_NOT_ALLOWED", f"{request.method} is not allowed here; {allowed} is.", {"Allow": allowed}
            )
        return found[verb]

    def _method(self, binding: Binding) -> Any:
        """The callable of a method on the channel of the peer that serves it."""
        if binding.rpc not in self._methods:
            channel = getattr(self._peers, PEERS[binding.method.containing_service.file.package])
            kind = channel.unary_stream if binding.streams else channel.unary_unary
            self._methods[binding.rpc] = kind(
                binding.rpc,
                request_serializer=binding.input.SerializeToString,
                response_deserializer=binding.output.FromString,
            )
        return self._methods[binding.rpc]


async def _read_body(request: web.Request, binding: Binding) -> bytes:
    body = await request.read()
    if body and binding.body and request.headers.get("Content-Type"):
        kind, charset = request.content_type, request.charset or "utf-8"
        if kind != "application/json" or charset.lower().replace("-", "") != "utf8":
            raise Refusal(
                415, "MEDIA_TYPE_UNSUPPORTED", f"The body must be application/json in UTF-8, not {kind}.",
                {"Accept": "application/json"},
            )  # fmt: skip
    return body


async def _stream(request: web.Request, call: Any) -> web.StreamResponse:
    """Send each message of a call as a line, until the call ends or the client leaves."""
    messages: AsyncIterator[Message] = aiter(call)
    response: web.StreamResponse | None = None
    upcoming: asyncio.Future[Message | None] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(messages, None))
            patience = PRESENCE_S if response else FIRST_MESSAGE_S
            while not (await asyncio.wait([upcoming], timeout=patience))[0]:
                response, patience = response or await _begin(request), PRESENCE_S
                if client_left(request):
                    return response
            message = upcoming.result()
            response = response or await _begin(request)
            if message is None or request.method == "HEAD":
                return response
            await response.write(to_json(message))
    except ConnectionError:
        return response or web.Response()
    except Exception as error:
        if response is None:
            raise
        with suppress(ConnectionError):
            await response.write(json.dumps({"error": problem_of(request, error).document}).encode() + b"\n")
        return response
    finally:
        # Leaving the iteration does not stop the server: only cancelling the call does.
        call.cancel()
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.wait([upcoming])


async def _begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    await response.prepare(request)
    return response


def to_json(message: Message) -> bytes:
    """ProtoJSON of a message in UTF-8, with a line end."""
    return json.dumps(json_format.MessageToDict(message), ensure_ascii=False).encode() + b"\n"
