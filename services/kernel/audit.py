"""Audit entries on their way: written before the call is answered, finished even when the call is cancelled."""

import asyncio
import logging
from datetime import datetime
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from prometheus_client import Counter

from services.kernel.clock import SYSTEM, Clock
from services.kernel.identity import Auditor, AuditRecord

log = logging.getLogger(__name__)

# Strangers write down at most so many refusals at once, and then one each so many seconds: anybody who reaches the
# port can cause one, each costs a write to the disk, and none says more than the ones before.
_STRANGERS, _STRANGER_S = 1000, 5.0

_strangers_dropped = Counter(
    "ekiben_audit_strangers_dropped_total", "Refusals of callers without a valid token, too many to be written down."
)

_LONGEST = 500  # characters of a resource's name in an entry: whoever is refused may have sent any


class Writer:
    """Gives entries to the auditor. One that cannot be written is logged in full: it is not lost in silence."""

    def __init__(self, auditor: Auditor | None, clock: Clock = SYSTEM) -> None:
        self._auditor = auditor
        self._clock = clock
        self._pending: set[asyncio.Task[None]] = set()
        self._strangers = float(_STRANGERS)
        self._counted_at = clock.monotonic()

    def now_utc(self) -> datetime:
        """The time for an entry."""
        return self._clock.now()

    async def now(self, entry: AuditRecord) -> None:
        """Write `entry` and return; when the caller is cancelled the writing goes on."""
        if self._auditor is not None and (entry.user or self._takes_a_stranger()):
            await asyncio.shield(self._start(entry))

    def later(self, entry: AuditRecord) -> None:
        """Begin to write `entry`: for a call which is being cancelled and cannot wait."""
        if self._auditor is not None:
            self._start(entry)

    async def finish(self) -> None:
        """Wait for what is being written."""
        if self._pending:
            await asyncio.wait(self._pending, timeout=5)

    def _takes_a_stranger(self) -> bool:
        now = self._clock.monotonic()
        self._strangers = min(_STRANGERS, self._strangers + (now - self._counted_at) / _STRANGER_S)
        self._counted_at = now
        if self._strangers < 1:
            _strangers_dropped.inc()
            return False
        self._strangers -= 1
        return True

    def _start(self, entry: AuditRecord) -> asyncio.Task[None]:
        # Not a loose task: `finish` waits for it before the auditor closes.
        task = asyncio.get_running_loop().create_task(self._write(entry))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        return task

    async def _write(self, entry: AuditRecord) -> None:
        assert self._auditor is not None
        try:
            await self._auditor.record(entry)
        except Exception:
            # The call is not failed for it: a change that was made cannot be unmade here.
            log.exception("audit entry could not be written", extra={"entry": entry})


def resource_of(request_type: str, request: Any, raw: bytes, response: Any = None) -> str:
    """Name of the resource that a call is about: of what it returned, of what it names, else of the parent.

    A call refused before its message was read is judged by `raw`, as far as that is a message at all.
    """
    if isinstance(response, Message) and (name := _field(response, "name")):
        return name
    if request is None and raw and request_type:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(request_type)
        request = message_factory.GetMessageClass(descriptor)()
        try:
            request.ParseFromString(raw)
        except DecodeError:
            return ""
    if not isinstance(request, Message):
        return ""
    if name := _field(request, "name"):
        return name
    for field, value in request.ListFields():
        if field.message_type is not None and not field.is_repeated and (name := _field(value, "name")):
            return name
    names = getattr(request, "names", None)
    return ",".join(names)[:_LONGEST] if names else _field(request, "parent")


def _field(message: Message, name: str) -> str:
    value = getattr(message, name, "")
    return value[:_LONGEST] if isinstance(value, str) else ""
