"""What is remembered of API tokens, so that not every call asks the database."""

from collections.abc import Awaitable, Callable

from services.kernel.clock import Clock
from services.registry.identities import ApiToken, User

KNOWN_S = 5.0
"""How long, as the other services do. What this process changes counts at once; this is for what another registry on
the same database changes."""
_MOST = 10_000

Found = tuple[str, ApiToken, User]
"""Organization, token and its user."""


class KnownTokens:
    """Rows by the hash of the token. What is not there is not remembered."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, Found]] = {}
        self._forgotten = 0

    async def get(self, token_hash: str, ask: Callable[[str], Awaitable[Found | None]]) -> Found | None:
        """What is remembered, or what `ask` gives."""
        known = self._known.get(token_hash)
        if known is not None and known[0] > self._clock.monotonic():
            return known[1]
        until, forgotten = self._clock.monotonic() + KNOWN_S, self._forgotten
        found = await ask(token_hash)
        if found is not None and forgotten == self._forgotten:  # otherwise this may be what was there before
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[token_hash] = until, found
        return found

    def forget(self) -> None:
        """To be called after each change of a token or a user."""
        self._forgotten += 1
        self._known.clear()
