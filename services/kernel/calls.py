"""One call while it runs: its ids, its span and its deadline; at its end, the metrics and the access line."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from prometheus_client import Counter, Histogram

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.channel import REQUEST_ID_KEY
from services.kernel import identity, telemetry
from services.kernel.identity import Caller
from services.kernel.policies import Policy

log = logging.getLogger("services.access")

# Time for the caller to hear which inner call was slow, rather than that its own time is up.
_DEADLINE_MARGIN_S = 0.02
_REQUEST_ID = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]{0,63}")

_handled = Counter("grpc_server_handled", "Calls answered.", ["grpc_service", "grpc_method", "grpc_code"])
_handling = Histogram(
    "grpc_server_handling_seconds",
    "Time from a call's arrival to its last answer.",
    ["grpc_service", "grpc_method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


@dataclass(eq=False)
class Call:
    """One call while it runs."""

    method: str
    """`ekiben.registry.v1.Models/GetModel`."""
    policy: Policy
    context: Any
    """grpc's ServicerContext."""
    caller: Caller
    metadata: dict[str, str]
    span: trace.Span
    started: float
    task: asyncio.Task[Any] | None
    raw: bytes
    """The request as it came, where it is one message."""
    timeout: asyncio.Timeout
    """Ends the work a little before the caller's deadline."""
    request: Any = None
    code: str = "OK"
    reason: str = ""
    stopped: bool = False
    """Ended by the server's own shutdown."""

    @classmethod
    def begin(cls, method: str, policy: Policy, component: str, raw: Any, context: Any) -> "Call":
        """Take up a call: its ids and span are those of this task from here on."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        sent = metadata.get(REQUEST_ID_KEY, "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(16)
        # The gateway adds the address that it saw at the end; what stands before is a stranger's word.
        forwarded = metadata.get("x-forwarded-for", "").rpartition(",")[2].strip()
        caller = Caller(method, request_id, forwarded or context.peer(), component)
        # The call has a task, and so a context, of its own: what is set here ends with it.
        identity.set_caller(caller)
        telemetry.set_component(component)
        span: trace.Span = trace.INVALID_SPAN
        if policy.observed:
            span = _start_span(method, request_id, metadata)
        remaining = context.time_remaining()
        timeout = asyncio.timeout(None if remaining is None else max(0.0, remaining - _DEADLINE_MARGIN_S))
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        message = raw if isinstance(raw, bytes) else b""
        task = asyncio.current_task()
        return cls(method, policy, context, caller, metadata, span, time.monotonic(), task, message, timeout)

    def end(self) -> None:
        """Count the call, end its span, write its access line."""
        duration_s = time.monotonic() - self.started
        _count(self.method, self.code, duration_s)
        if not self.policy.observed:
            return
        self.span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[self.code].value[0])
        self.span.end()
        # What services say to one another all the time is for who looks for it.
        quiet = self.policy.role == Role.ROLE_SERVICE and self.code == "OK"
        level = logging.DEBUG if quiet else logging.INFO
        if log.isEnabledFor(level):
            fields: dict[str, object] = {"method": self.method, "code": self.code}
            if self.reason:
                fields["reason"] = self.reason
            fields["duration_s"] = duration_s
            fields["user"] = self.caller.principal.user or "-"
            fields["peer"] = self.caller.peer
            log.log(level, "call", extra=fields)


def _start_span(method: str, request_id: str, metadata: Mapping[str, str]) -> trace.Span:
    service, _, name = method.partition("/")
    span = telemetry.tracer().start_span(
        method,
        context=telemetry.context_of(metadata),
        kind=trace.SpanKind.SERVER,
        attributes={
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "ekiben.request_id": request_id,
        },
    )
    otel_context.attach(trace.set_span_in_context(span))
    return span


# Looking a child up by its labels costs more than counting; methods and codes are few.
_children: dict[tuple[str, str], tuple[Any, Any]] = {}


def _count(method: str, code: str, duration_s: float) -> None:
    children = _children.get((method, code))
    if children is None:
        service, _, name = method.partition("/")
        children = _handled.labels(service, name, code), _handling.labels(service, name)
        _children[method, code] = children
    children[0].inc()
    children[1].observe(duration_s)
