"""Channels to the other services, and what the registry answers for them: who calls, and what is kept of it.

Calls carry the service token, so they may do anything: **a front that passes on a stranger's call must not lend
it that token.** It wraps the call in `with_token(token)`, with an empty token for a caller who sent none:

    with with_token(token_of(headers)):
        response = await stub.GetModel(request)      # as the caller, or UNAUTHENTICATED

A service that acts for a user it knows says so, for the audit log: `with on_behalf_of(current_principal()): ...`
"""

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import datetime

import grpc
from google.protobuf import timestamp_pb2
from grpc import aio
from opentelemetry import propagate, trace
from prometheus_client import Counter

from ekiben.channel import REQUEST_ID_KEY, CallObserver, Tls, checked_token, open_channel
from ekiben.errors import EkibenError, FailedPrecondition, Unauthenticated, Unavailable
from ekiben.identity.v1 import identity_pb2, identity_pb2_grpc
from services.kernel import telemetry
from services.kernel.clock import SYSTEM, Clock
from services.kernel.identity import AuditRecord, Principal, current_caller, read_service_token
from services.kernel.interceptors import ORGANIZATION_KEY, SERVICE_KEY, USER_KEY
from services.kernel.settings import PeerSettings

log = logging.getLogger(__name__)

_token: ContextVar[str | None] = ContextVar("ekiben_token", default=None)
_behalf: ContextVar[Principal | None] = ContextVar("ekiben_behalf", default=None)
_entries_lost = Counter("ekiben_audit_entries_dropped_total", "Audit entries that could not be sent; each is logged.")

# A deleted token stops working within five seconds everywhere, which the API promises.
_KNOWN_S, _UNKNOWN_S = 5.0, 1.0
_CACHE = 10_000
_BUFFER, _BATCH = 20_000, 200

CHOSEN_DEPLOYER = "ekiben.deployer.v1.Deployments"
"""By this name in grpc.health.v1 a deployer says whether it is the one to be called."""


class Peers:
    """Channels to the services of the suite, opened when first asked for."""

    def __init__(self, settings: PeerSettings, caller: str) -> None:
        self.settings = settings
        self.caller = caller
        self.service_token = read_service_token(settings.service_token_file)
        """The suite's own secret, from which services derive others. Never to be sent to anybody else."""
        self._tls = (
            Tls(settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file) if settings.tls_ca_file else None
        )
        self._channels: dict[tuple[str, str], aio.Channel] = {}

    @property
    def registry(self) -> aio.Channel:
        """The registry: ekiben.registry.v1 and ekiben.identity.v1."""
        return self._channel("registry", self.settings.registry)

    @property
    def builder(self) -> aio.Channel:
        """The builder: ekiben.builder.v1."""
        return self._channel("builder", self.settings.builder)

    @property
    def deployer(self) -> aio.Channel:
        """The deployer: ekiben.deployer.v1. Of several, the one that has the cluster."""
        return self._channel("deployer", self.settings.deployer, CHOSEN_DEPLOYER)

    @property
    def recorder(self) -> aio.Channel:
        """The recorder: ekiben.recorder.v1."""
        return self._channel("recorder", self.settings.recorder)

    @property
    def blobs(self) -> str:
        """Address of the registry's bytes endpoint: `unix:/path` or `http://host:port`."""
        return self.settings.blobs

    async def close(self) -> None:
        """Close every channel; calls in flight end."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in dict.fromkeys(channels):
            await channel.close(None)

    def _channel(self, name: str, address: str, serving: str = "") -> aio.Channel:
        if not address:
            raise FailedPrecondition(
                f"No address of the {name} is set: set EKIBEN_PEERS_{name.upper()}.",
                reason="PEER_NOT_SET",
                peer=name,
            )
        local = address.startswith("unix:")
        key = (address, "" if local else serving)
        # Standalone gives all four the same address, of a socket: one connection does for them.
        channel = self._channels.get(key)
        if channel is None:
            tls = None if local else self._tls
            channel = open_channel(address, tls=tls, metadata=self._metadata, observe=_ClientSpan, serving=key[1])
            self._channels[key] = channel
        return channel

    def _metadata(self) -> Iterable[tuple[str, str]]:
        own = _token.get()
        if own is not None:
            if own:
                yield "authorization", f"Bearer {checked_token(own)}"
        else:
            yield "authorization", f"Bearer {self.service_token}"
            yield SERVICE_KEY, self.caller
            principal = _behalf.get()
            if principal is not None and principal.user:
                yield USER_KEY, principal.user
                yield ORGANIZATION_KEY, principal.organization
        caller = current_caller()
        if caller is not None and caller.request_id:
            yield REQUEST_ID_KEY, caller.request_id


@asynccontextmanager
async def open_peers(settings: PeerSettings, *, caller: str) -> AsyncIterator[Peers]:
    """Peers as the service `caller` ("builder") sees them; closed at the end."""
    peers = Peers(settings, caller)
    try:
        yield peers
    finally:
        await peers.close()


@contextmanager
def with_token(token: str) -> Iterator[None]:
    """Calls begun inside carry `token` instead of the service token; none at all when it is empty."""
    reset = _token.set(token)
    try:
        yield
    finally:
        _token.reset(reset)


@contextmanager
def on_behalf_of(principal: Principal) -> Iterator[None]:
    """Calls begun inside name `principal` as who caused them; they still have a service's rights."""
    reset = _behalf.set(principal)
    try:
        yield
    finally:
        _behalf.reset(reset)


class _ClientSpan(CallObserver):
    """A CLIENT span around one call, where a trace is being recorded; its `traceparent` always."""

    def __init__(self, method: str) -> None:
        name = method.removeprefix("/")
        self._span: trace.Span = trace.INVALID_SPAN
        self._ended = False
        if trace.get_current_span().is_recording() and "opentelemetry.proto" not in name:
            service, _, short = name.partition("/")
            self._span = telemetry.tracer().start_span(
                name,
                kind=trace.SpanKind.CLIENT,
                attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": short},
            )

    def headers(self) -> Iterable[tuple[str, str]]:
        carrier: dict[str, str] = {}
        if self._span.get_span_context().is_valid:
            propagate.inject(carrier, context=trace.set_span_in_context(self._span))
        else:
            propagate.inject(carrier)
        if "traceparent" not in carrier:
            # A loop's own call, which no user caused. Unsampled, or else each poll would begin a trace at the server,
            # and the few traces that somebody looks for would drown.
            carrier["traceparent"] = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
        return carrier.items()

    def ended(self, code: str, error: EkibenError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if error is not None:
            telemetry.fail_span(self._span, error.reason)
        self._span.end()


class RemoteAuthenticator:
    """Asks the registry who a token belongs to; remembers the answer for five seconds, a refusal for one."""

    def __init__(self, registry: aio.Channel, clock: Clock = SYSTEM) -> None:
        self._accounts = identity_pb2_grpc.AccountsStub(registry)
        self._clock = clock
        # Keyed by a hash, so that a dump of memory gives nobody the tokens.
        self._known: OrderedDict[bytes, tuple[float, Principal | Unauthenticated]] = OrderedDict()

    async def authenticate(self, token: str) -> Principal:
        """See Authenticator."""
        key = hashlib.sha256(token.encode()).digest()
        found = self._known.get(key)
        if found is None or found[0] <= self._clock.monotonic():
            found = await self._ask(token)
            self._known[key] = found
            self._known.move_to_end(key)
            while len(self._known) > _CACHE:
                self._known.popitem(last=False)
        if isinstance(found[1], Unauthenticated):
            refusal = found[1]
            raise Unauthenticated(refusal.message, reason=refusal.reason)
        return found[1]

    async def _ask(self, token: str) -> tuple[float, Principal | Unauthenticated]:
        asked = self._clock.monotonic()
        try:
            answer = await self._accounts.Authenticate(identity_pb2.AuthenticateRequest(token=token), timeout=5.0)
        except Unauthenticated as refusal:
            if refusal.reason == "SERVICE_TOKEN_INVALID":
                # Our own, not the caller's: the operator gave the services different ones.
                log.error("the registry does not take this service's token")
                raise Unavailable(
                    "This service cannot ask the registry who you are: their service tokens differ.",
                    reason="SERVICE_TOKEN_MISMATCH",
                ) from refusal
            return asked + _UNKNOWN_S, refusal
        principal = Principal(
            answer.user, answer.organization, answer.role, answer.api_token, answer.api_token_display_name
        )
        return asked + _KNOWN_S, principal


class RemoteAuditor:
    """Sends entries to the registry in batches; `run` is a loop of the process.

    While the registry is away entries wait in memory; past 20,000, and at an end that finds it away still,
    each is logged instead and counted.
    """

    def __init__(self, registry: aio.Channel, clock: Clock = SYSTEM) -> None:
        self._audit = identity_pb2_grpc.AuditStub(registry)
        self._clock = clock
        self._waiting: deque[AuditRecord] = deque()
        self._more = asyncio.Event()

    async def record(self, entry: AuditRecord) -> None:
        """See Auditor: the entry is on its way."""
        if len(self._waiting) >= _BUFFER:
            self._lose([self._waiting.popleft()])
        self._waiting.append(entry)
        self._more.set()

    async def run(self) -> None:
        """Send what waits, for ever; after a failure wait a second."""
        with with_no_call():
            while True:
                await self._more.wait()
                self._more.clear()
                while self._waiting:
                    if not await self._send():
                        await self._clock.sleep(1.0)

    async def close(self) -> None:
        """Send the rest, for at most three seconds; log what is left."""
        try:
            async with asyncio.timeout(3):
                while self._waiting and await self._send():
                    pass
        except TimeoutError:
            log.warning("the registry did not take the last audit entries in time")
        self._lose(list(self._waiting))
        self._waiting.clear()

    async def _send(self) -> bool:
        batch = [self._waiting[i] for i in range(min(_BATCH, len(self._waiting)))]
        request = identity_pb2.RecordAuditEntriesRequest(audit_entries=[_entry(record) for record in batch])
        try:
            await self._audit.RecordAuditEntries(request, timeout=5.0)
        except EkibenError as exc:
            log.warning("audit entries wait", extra={"entries": len(self._waiting), "reason": exc.reason})
            return False
        for record in batch:
            if self._waiting and self._waiting[0] is record:
                self._waiting.popleft()
        return True

    def _lose(self, entries: list[AuditRecord]) -> None:
        for entry in entries:
            _entries_lost.inc()
            log.error("audit entry was not sent", extra={"entry": entry})


@contextmanager
def with_no_call() -> Iterator[None]:
    """Code inside acts for the process: its calls carry the service token and belong to no trace."""
    token, behalf = _token.set(None), _behalf.set(None)
    try:
        with telemetry.untraced():
            yield
    finally:
        _behalf.reset(behalf)
        _token.reset(token)


def _entry(record: AuditRecord) -> identity_pb2.AuditEntry:
    return identity_pb2.AuditEntry(
        create_time=_timestamp(record.time),
        user=record.user,
        api_token=record.api_token,
        method=record.method,
        resource=record.resource,
        outcome=record.outcome,
        detail=record.detail,
        request_id=record.request_id,
        trace_id=record.trace_id,
        peer=record.peer,
    )


def _timestamp(time: datetime) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromDatetime(time)
    return timestamp
