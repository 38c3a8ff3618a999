"""Loop: forgets what is too old, then the oldest of what is too much."""

import logging

from ekiben.errors import EkibenError
from services.kernel.clock import Clock
from services.recorder.store import PREDICTIONS, TRACES, PredictionStore, TraceStore, UsageStore

log = logging.getLogger(__name__)

_PERIOD_S = 60.0
# Rows of one transaction: a writer waits for it, about 20 ms on SQLite.
_BATCH = 1000
_MINUTE_US = 60_000_000
# Minutes looked at in one go, when there is too much.
_MINUTES = 500


class Retention:
    """Forgets predictions, monitor entries and traces by age and by size."""

    def __init__(
        self,
        predictions: PredictionStore,
        traces: TraceStore,
        usage: UsageStore,
        clock: Clock,
        *,
        retention_days: float,
        max_stored_bytes: int,
    ) -> None:
        self._forgetters = {PREDICTIONS: predictions.forget_before, TRACES: traces.forget_before}
        self._usage = usage
        self._clock = clock
        self._retention_days = retention_days
        self._max_stored_bytes = max_stored_bytes

    async def run(self) -> None:
        """Sweep each minute, for ever. A database that is away is tried again at the next."""
        while True:
            try:
                await self._usage.alone(self.sweep)
            except EkibenError as exc:
                log.warning("retention put off", extra={"reason": exc.reason, "detail": str(exc)})
            await self._clock.sleep(_PERIOD_S)

    async def sweep(self) -> None:
        """Forget once all that is too old or too much. Idempotent, and safe beside writers and other sweeps."""
        if self._retention_days:
            oldest_us = int((self._clock.now().timestamp() - self._retention_days * 86400) * 1_000_000)
            for log_name in self._forgetters:
                await self._forget(log_name, oldest_us // _MINUTE_US, "age")
        if self._max_stored_bytes:
            while await self._shrink():
                pass

    async def _shrink(self) -> bool:
        """Forget whole minutes, oldest first over both logs, until the rest fits; whether there may be more to do."""
        excess = sum((await self._usage.totals()).values()) - self._max_stored_bytes
        if excess <= 0:
            return False
        minutes = [
            (minute, size, name)
            for name in self._forgetters
            for minute, size in await self._usage.oldest(name, _MINUTES)
        ]
        until: dict[str, int] = {}
        for minute, size, name in sorted(minutes):
            if excess <= 0:
                break
            until[name] = minute + 1
            excess -= size
        for name, minute in until.items():
            await self._forget(name, minute, "size")
        return bool(until) and excess > 0

    async def _forget(self, name: str, minute: int, why: str) -> None:
        total = 0
        while forgotten := await self._forgetters[name](minute * _MINUTE_US, _BATCH):
            total += forgotten
        await self._usage.forget_before(name, minute)
        if total:
            log.info("forgot old records", extra={"log": name, "count": total, "why": why})
