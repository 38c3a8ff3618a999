"""Wake-ups within a process: who changed a row says so, who watches it looks again.

    topic = Topic()
    async for _ in topic.changes(name, at_most_s=5):     # at once, then after each change, or after five seconds
        build = await store.get(name)
        yield build
        if build.done:
            return
    ...
    topic.notify(name)                                   # after the transaction has committed

Level-triggered: a wake-up carries no news, the watcher reads the state. Any number of changes while it reads
make one more turn, and none is missed. `at_most_s` covers changes that another process made.
"""

import asyncio
from collections.abc import AsyncIterator


class Topic:
    """Wake-ups by key; the empty key hears all."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def notify(self, key: str = "") -> None:
        """Wake who watches `key`, and who watches all; with no key, everybody. From the event loop's thread only."""
        for watched, events in self._waiting.items():
            if not key or watched in ("", key):
                for event in events:
                    event.set()

    async def changes(self, key: str = "", *, at_most_s: float | None = None) -> AsyncIterator[None]:
        """Yield at once, then after each `notify` of `key`, and at the latest every `at_most_s` seconds; never ends."""
        event = asyncio.Event()
        events = self._waiting.setdefault(key, set())
        events.add(event)
        try:
            while True:
                yield
                await _wait(event, at_most_s)
                event.clear()
        finally:
            events.discard(event)
            if not events and self._waiting.get(key) is events:
                del self._waiting[key]


class Signal:
    """One wake-up for one loop: `notify` any number of times, `wait` returns once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Let the next `wait` return; from the event loop's thread only."""
        self._event.set()

    async def wait(self, at_most_s: float | None = None) -> bool:
        """Return after a `notify` since the last return, or after `at_most_s`; whether there was a `notify`."""
        notified = await _wait(self._event, at_most_s)
        self._event.clear()
        return notified


async def _wait(event: asyncio.Event, at_most_s: float | None) -> bool:
    try:
        async with asyncio.timeout(at_most_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
