"""What happens around every call: one interceptor, in one order, for all four kinds of call.

Request id and trace; who calls and whether they may (`policies`); the message read; the servicer; then the
audit entry, the errors as `google.rpc.Status`, the access line and the metrics. A servicer is written as if
none of this existed: it raises errors of `ekiben.errors`, and asks `identity.current_principal()`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from ekiben import errors
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.channel import REQUEST_ID_KEY, STATUS_KEY, from_rpc_error
from ekiben.errors import (
    DeadlineExceeded,
    EkibenError,
    Internal,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from services.kernel import identity, telemetry
from services.kernel.audit import Writer, resource_of
from services.kernel.calls import Call
from services.kernel.identity import ANONYMOUS, DEFAULT_ORGANIZATION, Principal, ServiceTokenAuthenticator, token_of
from services.kernel.policies import Policy, policy_of

bugs = logging.getLogger(__name__)

USER_KEY, ORGANIZATION_KEY, SERVICE_KEY = "ekiben-user", "ekiben-organization", "ekiben-service"

# After these the change may have happened all the same, so an audited call is written down.
_UNCERTAIN = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN"})


class CallInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]
    """The whole chain. `components` gives the component of each service, for spans."""

    def __init__(
        self, authenticator: ServiceTokenAuthenticator, audit: Writer, components: Mapping[str, str] | None = None
    ) -> None:
        self._authenticator = authenticator
        self._audit = audit
        self._components = components or {}
        self._wrapped: dict[str, tuple[Any, Any]] = {}
        self._streams: set[Call] = set()

    def stop_streams(self) -> None:
        """End response streams in flight with UNAVAILABLE: a watch would otherwise outlast any grace period."""
        for call in list(self._streams):
            if call.task is not None and not call.stopped:
                call.stopped = True
                call.task.cancel()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler of the method, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/")
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _wrap(self, method: str, handler: Any) -> Any:
        policy = policy_of(method)
        read = handler.request_deserializer
        if handler.request_streaming:
            if handler.response_streaming:
                return grpc.stream_stream_rpc_method_handler(
                    self._stream(method, policy, _iterated(read), handler.stream_stream),
                    None,
                    handler.response_serializer,
                )
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, policy, _iterated(read), handler.stream_unary), None, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, policy, _once(read), handler.unary_stream), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, policy, _once(read), handler.unary_unary), None, handler.response_serializer
        )

    def _unary(self, method: str, policy: Policy, read: Callable[[Any], Any], behaviour: Any) -> Any:
        async def handle(raw: Any, context: Any) -> Any:
            call = self._begin(method, policy, raw, context)
            try:
                async with call.timeout:
                    await self._admit(call)
                    call.request = read(raw)
                    response = await behaviour(call.request, context)
                    if policy.audited:
                        await self._write_down(call, "OK", response=response)
                return response
            except BaseException as exc:
                await self._fail(call, exc)
            finally:
                call.end()

        return handle

    def _stream(self, method: str, policy: Policy, read: Callable[[Any], Any], behaviour: Any) -> Any:
        async def handle(raw: Any, context: Any) -> AsyncIterator[Any]:
            call = self._begin(method, policy, raw, context)
            self._streams.add(call)
            try:
                async with call.timeout:
                    await self._admit(call)
                    call.request = read(raw)
                    if policy.audited:
                        await self._write_down(call, "OK")
                    responses = behaviour(call.request, context)
                    if hasattr(responses, "__aiter__"):
                        async for response in responses:
                            yield response
                    else:
                        await responses  # a servicer of another maker, which writes by `context.write`
            except GeneratorExit:
                call.code = "CANCELLED"
                raise
            except BaseException as exc:
                await self._fail(call, exc)
            finally:
                self._streams.discard(call)
                call.end()

        return handle

    def _begin(self, method: str, policy: Policy, raw: Any, context: Any) -> Call:
        return Call.begin(method, policy, self._components.get(method.partition("/")[0], ""), raw, context)

    async def _admit(self, call: Call) -> None:
        """Find out who calls and refuse who may not.

        Raises:
            Unauthenticated: no token (TOKEN_MISSING), or one that does not work.
            PermissionDenied: the caller's role is too low (ROLE_TOO_LOW).
        """
        need = call.policy.role
        token = token_of(call.metadata)
        principal = ANONYMOUS
        if token and self._authenticator.is_service(token):
            user = call.metadata.get(USER_KEY) or f"services/{call.metadata.get(SERVICE_KEY, 'unknown')}"
            organization = call.metadata.get(ORGANIZATION_KEY, DEFAULT_ORGANIZATION)
            principal = Principal(user, organization, Role.ROLE_SERVICE)
        elif token:
            try:
                principal = await self._authenticator.authenticate(token)
            except (Unauthenticated, Unavailable):
                if need != Role.ROLE_ANYONE:
                    raise
        elif need != Role.ROLE_ANYONE:
            raise Unauthenticated(
                "This needs an API token: send it as `authorization: Bearer TOKEN`.", reason="TOKEN_MISSING"
            )
        call.caller.principal = principal
        if principal.user:
            call.span.set_attribute("enduser.id", principal.user)
        if need == Role.ROLE_UNSPECIFIED or principal.role < need:
            needed, has = identity.role_name(need), identity.role_name(principal.role)
            raise PermissionDenied(
                f"{call.method} needs {needed}, and this token of {principal.user or 'nobody'} has {has}. "
                "Use one that may, or ask an admin for it."
                if need
                else f"{call.method} is open to nobody.",
                reason="ROLE_TOO_LOW",
                method=call.method,
                needed_role=needed,
                role=has,
            )

    async def _fail(self, call: Call, exc: BaseException) -> None:
        """Tell the caller, by raising what ends the call; never returns."""
        error = self._error_of(call, exc)
        if error is None:
            if call.policy.audited and call.code in _UNCERTAIN:
                self._audit.later(self._entry(call, call.code))
            raise exc
        call.code, call.reason = error.code_name, error.reason
        telemetry.fail_span(call.span, error.reason)
        refused = isinstance(error, Unauthenticated | PermissionDenied)
        if isinstance(error, Unauthenticated) and call.caller.principal.role == Role.ROLE_SERVICE:
            # The service is who it says; the token that it asks about is a stranger's, and strangers may write so much.
            await self._audit.now(
                replace(self._entry(call, call.code, detail=f"{error.reason}: {error.message}"), user="")
            )
        elif refused or (call.policy.audited and call.code in _UNCERTAIN):
            await self._write_down(call, call.code, detail=f"{error.reason}: {error.message}")
        status = errors.to_status(error, request_id=call.caller.request_id)
        await call.context.abort(
            _CODES[error.code],
            status.message,
            ((STATUS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, call.caller.request_id)),
        )

    def _error_of(self, call: Call, exc: BaseException) -> EkibenError | None:
        """The error to send, or None to let `exc` pass as it is."""
        if isinstance(exc, EkibenError):
            return exc
        if isinstance(exc, aio.AbortError):
            code = call.context.code()
            call.code = code.name if isinstance(code, grpc.StatusCode) else _CODES[code or 2].name
            return None
        if isinstance(exc, asyncio.CancelledError):
            task = asyncio.current_task()
            if call.stopped and task is not None:
                task.uncancel()
                return Unavailable("The server is stopping; ask again.", reason="SERVER_STOPPING", retry_after_s=1.0)
            if task is not None and task.cancelling() == 0:
                # Somebody else's cancellation surfaced here; grpc would leave the caller waiting (grpc/grpc#29248).
                bugs.warning("a cancellation surfaced in a call", extra={"method": call.method}, exc_info=exc)
                return Unavailable("The work behind this call was cancelled; ask again.", reason="WORK_CANCELLED")
            call.code = "CANCELLED"
            return None
        if isinstance(exc, TimeoutError) and call.timeout.expired():
            return DeadlineExceeded(
                f"{call.method} did not finish within the time that the caller set.", reason="DEADLINE_EXCEEDED"
            )
        if isinstance(exc, grpc.RpcError):
            return from_rpc_error(exc)
        if isinstance(exc, NotImplementedError):
            return Unimplemented(f"{call.method} is not offered by this server.", reason="METHOD_UNIMPLEMENTED")
        if isinstance(exc, Exception):
            bugs.error("bug in a call", extra={"method": call.method}, exc_info=exc)
            call.span.record_exception(exc)
            return Internal(
                f"Something went wrong in the server. Its log tells more under request id {call.caller.request_id}.",
                reason="INTERNAL",
                request_id=call.caller.request_id,
            )
        return None

    async def _write_down(self, call: Call, outcome: str, *, response: Any = None, detail: str = "") -> None:
        await self._audit.now(self._entry(call, outcome, response=response, detail=detail))

    def _entry(self, call: Call, outcome: str, *, response: Any = None, detail: str = "") -> identity.AuditRecord:
        principal = call.caller.principal
        return identity.AuditRecord(
            time=self._audit.now_utc(),
            user=principal.user,
            organization=principal.organization,
            api_token=principal.api_token,
            method=call.method,
            resource=resource_of(call.policy.request_type, call.request, call.raw, response),
            outcome=outcome,
            detail=detail,
            request_id=call.caller.request_id,
            trace_id=telemetry.current_trace_id(),
            peer=call.caller.peer,
        )


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _once(read: Callable[[bytes], Any] | None) -> Callable[[Any], Any]:
    """Reads one message; bytes that are none are the caller's mistake, not INTERNAL as grpc would have it."""

    def deserialize(raw: bytes) -> Any:
        if read is None:
            return raw
        try:
            return read(raw)
        except (DecodeError, UnicodeDecodeError) as exc:
            raise InvalidArgument("The request is not a message of this method.", reason="MESSAGE_MALFORMED") from exc

    return deserialize


def _iterated(read: Callable[[bytes], Any] | None) -> Callable[[Any], Any]:
    """Reads a stream of messages."""
    one = _once(read)

    async def deserialize(raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for message in raw:
            yield one(message)

    return deserialize
