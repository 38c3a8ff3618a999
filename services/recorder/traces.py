"""Use cases over spans and traces."""

from collections.abc import Sequence

from prometheus_client import Counter

from ekiben import names
from ekiben.errors import NotFound
from services.kernel.clock import Clock
from services.recorder.domain import Span, TraceFilter, TraceSummary
from services.recorder.store import TraceStore

_recorded = Counter("ekiben_spans_recorded_total", "Spans kept.")
_dropped = Counter("ekiben_recorder_spans_dropped_total", "Spans that arrived and were not kept.", ["reason"])
for _reason in ("invalid", "trace_full"):
    _dropped.labels(_reason)


class Traces:
    """Records spans and gives traces."""

    def __init__(self, store: TraceStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def get(self, organization: str, name: names.Trace) -> tuple[TraceSummary, list[Span]]:
        """One trace with its spans by start time.

        Raises:
            NotFound: the organization has none of that id (TRACE_NOT_FOUND).
        """
        found = await self._store.get(organization, name.trace)
        if found is None:
            raise NotFound(
                f"Trace {str(name)!r} does not exist: it was not sampled, has not arrived yet, or was forgotten.",
                reason="TRACE_NOT_FOUND",
                trace=str(name),
            )
        return found

    async def page(
        self, wanted: TraceFilter, *, before: tuple[int, str] | None, size: int
    ) -> tuple[list[TraceSummary], tuple[int, str] | None]:
        """A page, newest first, and the position of the next one; None where there is none."""
        found = await self._store.page(wanted, before=before, limit=size + 1)
        more = len(found) > size
        found = found[:size]
        return found, (found[-1].start_ns, found[-1].trace_id) if more else None

    async def record(self, spans: Sequence[Span], *, invalid: int = 0) -> int:
        """Keep spans; how many could not be, because a trace is full or, `invalid` of them, had no valid ids.

        Raises:
            ResourceExhausted, Unavailable: nothing was kept; send the same again later.
        """
        added = await self._store.add(spans, int(self._clock.now().timestamp() * 1_000_000))
        _recorded.inc(added.recorded)
        _dropped.labels("trace_full").inc(added.trace_full)
        _dropped.labels("invalid").inc(invalid)
        return added.trace_full + invalid
