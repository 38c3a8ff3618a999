"""Channels to a server of the suite: address, TLS, identity, deadlines, retries, and errors as our classes.

    channel = open_channel("http://127.0.0.1:7400", token=token)
    stub = registry_pb2_grpc.ModelsStub(channel)
    await stub.GetModel(request)          # raises ekiben.errors.NotFound, not grpc.RpcError

All four kinds of call raise the class that the server raised. A call without a timeout gets the channel's default,
a response stream gets none. What is safe to repeat is retried while the server is UNAVAILABLE (AIP-194).
"""

import json
import secrets
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc import aio

from ekiben import errors
from ekiben.errors import EkibenError, InvalidArgument, Unauthenticated, Unavailable

DEFAULT_TIMEOUT_S = 30.0
MAX_MESSAGE_BYTES = 16 << 20
"""The largest message either way: a manifest of a few megabytes fits, bytes go over the blobs endpoint."""

STATUS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

# Methods by these prefixes read, or may be repeated without harm: what is retried when the server is away.
_IDEMPOTENT = ("Get", "List", "Watch", "Read", "Tail", "Authenticate", "Sign", "Record", "Acknowledge", "Reveal")
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2.0,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

traceparent: ContextVar[str] = ContextVar("ekiben_traceparent", default="")
"""W3C `traceparent` which calls of this context join; empty lets each call begin a trace."""


@dataclass(frozen=True)
class Tls:
    """How to know the server, and to be known by it. Files are PEM."""

    ca_file: Path | None = None
    """Roots that the server's certificate must chain to; None means those that gRPC brings."""
    cert_file: Path | None = None
    """Own certificate chain, for servers that ask for one."""
    key_file: Path | None = None
    """Its private key."""
    server_name: str = ""
    """Name that the certificate must carry when it is not the address's."""


class CallObserver(Protocol):
    """Told of one call from its start to its end: how the servers' kernel makes spans of calls."""

    def headers(self) -> Iterable[tuple[str, str]]:
        """Metadata to send with the call."""
        ...

    def ended(self, code: str, error: EkibenError | None) -> None:
        """The call is over, with a gRPC code's name. May come twice; the first counts."""
        ...


def open_channel(
    address: str,
    *,
    token: str | None = None,
    tls: Tls | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    metadata: Callable[[], Iterable[tuple[str, str]]] | None = None,
    observe: Callable[[str], CallObserver] | None = None,
    wait_for_ready: bool | None = None,
) -> aio.Channel:
    """A channel to `address`; it connects with its first call. Close it, or use it as an async context manager.

    Args:
        address: `host:port`, `unix:/path`, `http://host[:port]` or `https://host[:port]`.
        token: API token, sent with every call that brings no `authorization` of its own.
        tls: dial over TLS; `https://` alone does too, with gRPC's own roots.
        timeout_s: deadline of calls that set none; response streams get none.
        metadata: asked for more metadata at each call; a key that the call brings itself is left alone.
        observe: makes the observer of a call from its method; by default one that sends a `traceparent`.
        wait_for_ready: default of the calls: whether to wait, up to the deadline, for a server that is away.

    Raises:
        InvalidArgument: the address has none of these forms (ADDRESS_INVALID), or a TLS file cannot be read.
        Unauthenticated: the token holds what no token does (TOKEN_INVALID).
    """
    target, over_tls = parse_address(address)
    token = checked_token(token or "")

    def headers() -> list[tuple[str, str]]:
        pairs = list(metadata()) if metadata is not None else []
        if token and not any(key == "authorization" for key, _ in pairs):
            pairs.append(("authorization", f"Bearer {token}"))
        return pairs

    settings = _CallSettings(headers, observe or _OwnTrace, timeout_s, wait_for_ready)
    interceptors: Sequence[Any] = (
        _UnaryUnary(settings),
        _UnaryStream(settings),
        _StreamUnary(settings),
        _StreamStream(settings),
    )
    options = _options(target)
    if tls is None and not over_tls:
        return aio.insecure_channel(target, options=options, interceptors=interceptors)
    tls = tls or Tls()
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    try:
        credentials = grpc.ssl_channel_credentials(
            tls.ca_file.read_bytes() if tls.ca_file else None,
            tls.key_file.read_bytes() if tls.key_file else None,
            tls.cert_file.read_bytes() if tls.cert_file else None,
        )
    except OSError as exc:
        raise InvalidArgument(f"A TLS file cannot be read: {exc}.", reason="TLS_FILE_UNREADABLE") from exc
    return aio.secure_channel(target, credentials, options=options, interceptors=interceptors)


def parse_address(address: str) -> tuple[str, bool]:
    """gRPC's target for `address`, and whether it asks for TLS.

    Raises:
        InvalidArgument: not one of the forms that `open_channel` takes (ADDRESS_INVALID).
    """
    if address.startswith("unix:") and len(address) > 5:
        return address, False
    if address.startswith(("http://", "https://")):
        url = urlsplit(address)
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
        except ValueError:
            port = 0
        if url.hostname and port and url.path in ("", "/") and not url.query:
            host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
            return f"{host}:{port}", url.scheme == "https"
    else:
        host, _, digits = address.rpartition(":")
        if host and digits.isdigit() and int(digits) < 65536 and "/" not in host:
            return address, False
    raise InvalidArgument(
        f"{address!r} is not an address: use host:port, unix:/path, http://host:port or https://host:port.",
        reason="ADDRESS_INVALID",
        address=address,
    )


def checked_token(token: str) -> str:
    """`token` without white space around it, fit for a header.

    Raises:
        Unauthenticated: it holds white space, control or other characters that no token does (TOKEN_INVALID).
    """
    token = token.strip()
    if all("!" <= character <= "~" for character in token):
        return token
    raise Unauthenticated("The token holds characters that no API token does.", reason="TOKEN_INVALID")


def from_rpc_error(error: grpc.RpcError) -> EkibenError:
    """The class of the suite that a gRPC error stands for, with all that the server told."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else "") or ""
    trailers: Any = (error.trailing_metadata() if hasattr(error, "trailing_metadata") else None) or ()
    for key, value in trailers:
        if key == STATUS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value if isinstance(value, bytes) else value.encode("latin-1"))
            except DecodeError:  # someone else's trailer: the code and the text still say enough
                break
            if status.code == code.value[0]:
                return errors.from_status(status)
    reason = "SERVER_UNREACHABLE" if code is grpc.StatusCode.UNAVAILABLE else ""
    return errors.class_of(code.value[0])(details or f"The call failed with {code.name}.", reason=reason)


def _options(target: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 32 << 10),
        ("grpc.absolute_max_metadata_size", 64 << 10),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", _service_config()),
        # A server that restarts is back within a second or two; gRPC's own backoff goes up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # A watch may be silent for hours: find out within a minute that the other side is gone.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    host = target.rpartition(":")[0]
    if target.startswith("unix:") or host in ("localhost", "127.0.0.1", "[::1]"):
        options.append(("grpc.enable_http_proxy", 0))
    return options


_config = ""


def _service_config() -> str:
    """gRPC's retry policy for every idempotent method of the suite's APIs."""
    global _config
    if not _config:
        from ekiben.builder.v1 import builder_pb2
        from ekiben.deployer.v1 import deployer_pb2
        from ekiben.identity.v1 import identity_pb2
        from ekiben.recorder.v1 import recorder_pb2
        from ekiben.registry.v1 import registry_pb2

        names = [
            {"service": service.full_name, "method": method.name}
            for api in (builder_pb2, deployer_pb2, identity_pb2, recorder_pb2, registry_pb2)
            for service in api.DESCRIPTOR.services_by_name.values()
            for method in service.methods
            if method.name.startswith(_IDEMPOTENT)
        ]
        _config = json.dumps({"methodConfig": [{"name": names, "retryPolicy": _RETRY}]})
    return _config


class _OwnTrace:
    """Sends a `traceparent` of its own making: a client has no tracer, its servers begin the spans."""

    def __init__(self, _method: str) -> None:
        pass

    def headers(self) -> Iterable[tuple[str, str]]:
        yield "traceparent", traceparent.get() or f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"

    def ended(self, code: str, error: EkibenError | None) -> None:
        pass


@dataclass(frozen=True)
class _CallSettings:
    metadata: Callable[[], list[tuple[str, str]]]
    observe: Callable[[str], CallObserver]
    timeout_s: float
    wait_for_ready: bool | None

    def begin(self, details: Any, *, stream: bool) -> tuple[Any, CallObserver]:
        """The call's details with all that every call carries, and its observer."""
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        observer = self.observe(method)
        metadata = aio.Metadata(*(details.metadata or ()))
        present = {key for key, _ in metadata}
        for key, value in (*self.metadata(), *observer.headers(), (REQUEST_ID_KEY, secrets.token_hex(16))):
            if key not in present:
                metadata.add(key, value)
                present.add(key)
        timeout = details.timeout if details.timeout is not None or stream else self.timeout_s
        wait = details.wait_for_ready if details.wait_for_ready is not None else self.wait_for_ready
        return aio.ClientCallDetails(details.method, timeout, metadata, details.credentials, wait), observer


class _Call:
    """A call that raises our errors; everything else is the wrapped call's."""

    def __init__(self, call: Any, observer: CallObserver) -> None:
        self._call = call
        self._observer = observer
        call.add_done_callback(self._done)

    def _done(self, _call: object) -> None:
        # Reached by every end, an abandoned stream's too; what was raised has been told before.
        self._observer.ended("CANCELLED" if self._call.cancelled() else "OK", None)

    def _raised(self, error: grpc.RpcError) -> EkibenError:
        ours = from_rpc_error(error)
        self._observer.ended(ours.code_name, ours)
        return ours

    def cancelled(self) -> bool:
        return bool(self._call.cancelled())

    def done(self) -> bool:
        return bool(self._call.done())

    def time_remaining(self) -> float | None:
        remaining: float | None = self._call.time_remaining()
        return remaining

    def cancel(self) -> bool:
        return bool(self._call.cancel())

    def add_done_callback(self, callback: Any) -> None:
        self._call.add_done_callback(callback)

    async def initial_metadata(self) -> Any:
        return await self._call.initial_metadata()

    async def trailing_metadata(self) -> Any:
        return await self._call.trailing_metadata()

    async def code(self) -> Any:
        return await self._call.code()

    async def details(self) -> Any:
        return await self._call.details()

    async def debug_error_string(self) -> Any:
        return await self._call.debug_error_string()

    async def wait_for_connection(self) -> None:
        await self._call.wait_for_connection()

    # Of the kinds that answer once.
    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.RpcError as exc:
            raise self._raised(exc) from exc

    # Of the kinds that answer with a stream.
    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for response in self._call:
                yield response
        except grpc.RpcError as exc:
            raise self._raised(exc) from exc
        finally:
            # Leaving the loop early would otherwise let the server go on producing.
            if not self._call.done():
                self._call.cancel()

    async def read(self) -> Any:
        try:
            return await self._call.read()
        except grpc.RpcError as exc:
            raise self._raised(exc) from exc

    # Of the kinds that send a stream.
    async def write(self, request: Any) -> None:
        try:
            await self._call.write(request)
        except grpc.RpcError as exc:
            raise self._raised(exc) from exc

    async def done_writing(self) -> None:
        await self._call.done_writing()

    @property
    def _done_writing_flag(self) -> bool:
        return bool(self._call._done_writing_flag)


# grpc.aio looks at the class of what an interceptor returns, one class a kind.
class _UnaryUnaryCall(_Call, aio.UnaryUnaryCall):  # type: ignore[type-arg]
    pass


class _UnaryStreamCall(_Call, aio.UnaryStreamCall):  # type: ignore[type-arg]
    pass


class _StreamUnaryCall(_Call, aio.StreamUnaryCall):  # type: ignore[type-arg]
    pass


class _StreamStreamCall(_Call, aio.StreamStreamCall):  # type: ignore[type-arg]
    pass


class _UnaryUnary(aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, settings: _CallSettings) -> None:
        self._settings = settings

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details, observer = self._settings.begin(client_call_details, stream=False)
        return _UnaryUnaryCall(await continuation(details, request), observer)


class _UnaryStream(aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, settings: _CallSettings) -> None:
        self._settings = settings

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        details, observer = self._settings.begin(client_call_details, stream=True)
        return _UnaryStreamCall(await continuation(details, request), observer)


class _StreamUnary(aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, settings: _CallSettings) -> None:
        self._settings = settings

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        details, observer = self._settings.begin(client_call_details, stream=True)
        return _StreamUnaryCall(await continuation(details, request_iterator), observer)


class _StreamStream(aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, settings: _CallSettings) -> None:
        self._settings = settings

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        details, observer = self._settings.begin(client_call_details, stream=True)
        return _StreamStreamCall(await continuation(details, request_iterator), observer)


async def wait_until_ready(channel: aio.Channel, timeout_s: float) -> None:
    """Return once the channel is connected.

    Raises:
        Unavailable: it is not within `timeout_s` (SERVER_UNREACHABLE).
    """
    import asyncio

    try:
        async with asyncio.timeout(timeout_s):
            await channel.channel_ready()
    except TimeoutError:
        raise Unavailable(
            f"The server cannot be reached within {timeout_s:g} s.", reason="SERVER_UNREACHABLE"
        ) from None
