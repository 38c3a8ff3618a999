"""Calls that raise the suite's errors: a channel around grpc's, for all four kinds of call.

A wrapper rather than grpc's client interceptors: those keep an abandoned response stream alive in a cycle of
references, so that the server goes on producing until the garbage collector comes by, and cost a task a call.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc import aio

from ekiben import errors
from ekiben.errors import EkibenError

STATUS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

traceparent: ContextVar[str] = ContextVar("ekiben_traceparent", default="")
"""W3C `traceparent` which calls of this context join; empty lets each call begin a trace."""


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


class CallObserver(Protocol):
    """Told of one call from its start to its end: how the servers' kernel makes spans of calls."""

    def headers(self) -> Iterable[tuple[str, str]]:
        """Metadata to send with the call."""
        ...

    def ended(self, code: str, error: EkibenError | None) -> None:
        """The call is over, with a gRPC code's name. May come twice; the first counts."""
        ...


class OwnTrace:
    """Sends a `traceparent` of its own making: a client has no tracer, its servers begin the spans."""

    def __init__(self, _method: str) -> None:
        pass

    def headers(self) -> Iterable[tuple[str, str]]:
        yield "traceparent", traceparent.get() or f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"

    def ended(self, code: str, error: EkibenError | None) -> None:
        pass


@dataclass(frozen=True)
class CallSettings:
    """What every call of a channel has in common."""

    metadata: Callable[[], list[tuple[str, str]]]
    observe: Callable[[str], CallObserver]
    timeout_s: float
    wait_for_ready: bool | None


class RaisingChannel(aio.Channel):
    """grpc's channel, with calls that raise our errors and carry what `settings` say."""

    def __init__(self, channel: aio.Channel, settings: CallSettings) -> None:
        self._inner = channel
        self._settings = settings

    async def __aenter__(self) -> "RaisingChannel":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close it; calls in flight get `grace` seconds to end."""
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio.Channel."""
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio.Channel."""
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio.Channel."""
        await self._inner.channel_ready()

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._wrapped(method, self._inner.unary_unary(method, *args, **options), default_timeout=True)

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._wrapped(method, self._inner.unary_stream(method, *args, **options))

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._wrapped(method, self._inner.stream_unary(method, *args, **options))

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._wrapped(method, self._inner.stream_stream(method, *args, **options))

    def _wrapped(self, method: str, begin: Any, default_timeout: bool = False) -> Callable[..., "RaisingCall"]:
        settings = self._settings

        def call(
            request: Any = None,
            *,
            timeout: float | None = None,
            metadata: Any = None,
            wait_for_ready: bool | None = None,
            **options: Any,
        ) -> RaisingCall:
            observer = settings.observe(method)
            pairs = list(metadata or ())
            present = {key for key, _ in pairs}
            for key, value in (*settings.metadata(), *observer.headers(), (REQUEST_ID_KEY, secrets.token_hex(16))):
                if key not in present:
                    present.add(key)
                    pairs.append((key, value))
            if timeout is None and default_timeout:
                timeout = settings.timeout_s
            if wait_for_ready is None:
                wait_for_ready = settings.wait_for_ready
            begun = begin(request, timeout=timeout, metadata=pairs, wait_for_ready=wait_for_ready, **options)
            return RaisingCall(begun, observer)

        return call


class RaisingCall:
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
