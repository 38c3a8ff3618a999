"""Use cases over predictions and the values that `bentoml.monitor()` logged during them."""

from collections.abc import AsyncIterator, Sequence

from prometheus_client import Counter

from ekiben import names
from ekiben.errors import NotFound
from services.kernel.clock import Clock
from services.kernel.watches import Topic
from services.recorder.domain import MonitorEntry, Prediction, PredictionFilter
from services.recorder.store import PredictionStore

# Another replica's writes wake nobody here; half a second keeps a tail well within the two seconds promised.
TAIL_POLL_S = 0.5
# Rows read at once; with bodies they are heavy.
_TAIL_PAGE, _TAIL_PAGE_WITH_BODIES = 500, 50
# A page with bodies ends early rather than outgrow a message: 16 MiB, and a body that is text takes twice its size.
_MAX_PAGE_WITH_BODIES = 100
_MAX_PAGE_BYTES = 4 << 20
_NEWS = "predictions"

_recorded = Counter("ekiben_predictions_recorded_total", "Predictions added to the prediction log.")
_entries_recorded = Counter("ekiben_monitor_entries_recorded_total", "Records of bentoml.monitor() added.")


class Predictions:
    """Records predictions, finds them, follows them."""

    def __init__(self, store: PredictionStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._news = Topic()

    async def get(self, organization: str, name: names.Prediction) -> Prediction:
        """One prediction with bodies, and what was monitored in its trace and deployment.

        Raises:
            NotFound: the organization has none of that name (PREDICTION_NOT_FOUND).
        """
        found = await self._store.get(organization, name.prediction)
        if found is None:
            raise NotFound(
                f"Prediction {str(name)!r} does not exist, or was forgotten; `predictions list` shows what is kept.",
                reason="PREDICTION_NOT_FOUND",
                prediction=str(name),
            )
        return found

    async def page(
        self, wanted: PredictionFilter, *, before: tuple[int, int] | None, size: int, bodies: bool
    ) -> tuple[list[Prediction], tuple[int, int] | None]:
        """A page, newest first, and the position of the next one; None where there is none.

        Predictions that come between two pages move nothing: a position is a place in the order, not a count. With
        bodies a page may be shorter than asked.
        """
        size = min(size, _MAX_PAGE_WITH_BODIES) if bodies else size
        rows = await self._store.page(wanted, before=before, limit=size + 1, bodies=bodies)
        total = 0
        for index, row in enumerate(rows):
            total += len(row.prediction.request.body) + len(row.prediction.response.body)
            if index and total > _MAX_PAGE_BYTES:
                size = min(size, index)
        more = len(rows) > size
        rows = rows[:size]
        position = (rows[-1].prediction.start_time_us, rows[-1].sequence) if more else None
        return [row.prediction for row in rows], position

    async def record(self, batch: Sequence[Prediction]) -> int:
        """Keep predictions; how many were new. When this returns they are committed.

        Raises:
            ResourceExhausted, Unavailable: nothing was kept; send the same again later.
        """
        recorded = await self._store.add(batch, self._now_us())
        if recorded:
            _recorded.inc(recorded)
            self._news.notify(_NEWS)
        return recorded

    async def record_monitor_entries(self, entries: Sequence[MonitorEntry]) -> int:
        """Keep monitor entries; how many were new. Errors as of `record`."""
        recorded = await self._store.add_monitor_entries(entries, self._now_us())
        _entries_recorded.inc(recorded)
        return recorded

    async def end(self) -> int:
        """Where the log ends now: a tail from here gives what is recorded later."""
        return await self._store.last_sequence()

    async def tail(self, wanted: PredictionFilter, *, after: int, bodies: bool) -> AsyncIterator[Prediction]:
        """Predictions recorded after the place `after`, by whichever replica of the recorder; never ends.

        Each is given once, in the order of recording. A reader slower than the log gets everything, later.
        """
        page, sequence = _TAIL_PAGE_WITH_BODIES if bodies else _TAIL_PAGE, after
        async for _ in self._news.changes(_NEWS, at_most_s=TAIL_POLL_S):
            while True:
                rows, reached = await self._store.after(wanted, sequence, limit=page, bodies=bodies)
                for row in rows:
                    yield row.prediction
                if reached == sequence:
                    break
                sequence = reached

    def _now_us(self) -> int:
        return int(self._clock.now().timestamp() * 1_000_000)
