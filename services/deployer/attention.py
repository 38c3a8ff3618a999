"""Which deployments to look at: those of which something may differ, those whose time has come, and a few in turn."""

from collections.abc import Mapping
from typing import Any

from services.kernel.clock import Clock

TURN_S = 1.0
IN_TURN = 3
"""So many are looked at each TURN_S though nothing is known to differ: what everybody forgot to say is found out, and
costs the same among thousands as among three, which are thus all looked at each second."""


class Attention:
    """See the module."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._told: set[str] = set()
        self._later: dict[str, float] = {}
        self._round: list[str] = []
        self._turned_at: float | None = None

    def tell(self, uid: str) -> None:
        """Something of a deployment may differ."""
        self._told.add(uid)

    def later(self, uid: str, after_s: float) -> None:
        """Look at it again after so long, if nobody does before."""
        self._later[uid] = self._clock.monotonic() + after_s

    def in_turn(self, known: Mapping[str, Any]) -> set[str]:
        """Those whose turn it is; none before TURN_S has gone."""
        now = self._clock.monotonic()
        if self._turned_at is not None and now - self._turned_at < TURN_S:
            return set()
        self._turned_at = now
        chosen: set[str] = set()
        while len(chosen) < min(IN_TURN, len(known)):
            if not self._round:
                self._round = list(known)
            uid = self._round.pop()
            if uid in known:
                chosen.add(uid)
        return chosen

    def due(self) -> set[str]:
        """Those that were told of, and those whose time has come."""
        now = self._clock.monotonic()
        return self._told | {uid for uid, at in self._later.items() if at <= now}

    def looking(self, uid: str) -> None:
        """It is looked at now; what is told from here on counts for the next time."""
        self._told.discard(uid)
        self._later.pop(uid, None)
