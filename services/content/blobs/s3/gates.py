"""Who writes parts of which upload in this process, and how they are ended."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from services.content.blobs.parts import busy


@dataclass
class _Gate:
    sealed: bool = False
    users: int = 0
    writers: set[asyncio.Timeout] = field(default_factory=set)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class Gates:
    """One gate for each upload that somebody uses now."""

    def __init__(self) -> None:
        self._gates: dict[str, _Gate] = {}

    @contextlib.asynccontextmanager
    async def writing(self, upload: str) -> AsyncIterator[None]:
        """Held while a part is received. `seal` ends it early, as FailedPrecondition (UPLOAD_BUSY)."""
        async with self._gate(upload) as gate:
            if gate.sealed:
                raise busy(upload)
            scope = asyncio.timeout(None)
            try:
                async with scope:
                    gate.writers.add(scope)
                    yield
            except TimeoutError:
                if scope.expired():
                    raise busy(upload) from None
                raise
            finally:
                gate.writers.discard(scope)
                async with gate.changed:
                    gate.changed.notify_all()

    @contextlib.asynccontextmanager
    async def seal(self, upload: str, *, wait: bool = False) -> AsyncIterator[None]:
        """Let no part in, end those under way, and wait until they are.

        Raises:
            FailedPrecondition: sealed by another call and not `wait` (UPLOAD_BUSY).
        """
        async with self._gate(upload) as gate:
            async with gate.changed:
                if gate.sealed and not wait:
                    raise busy(upload)
                await gate.changed.wait_for(lambda: not gate.sealed)
                gate.sealed = True
            try:
                for scope in list(gate.writers):
                    scope.reschedule(asyncio.get_running_loop().time())
                async with gate.changed:
                    await gate.changed.wait_for(lambda: not gate.writers)
                yield
            finally:
                gate.sealed = False
                async with gate.changed:
                    gate.changed.notify_all()

    @contextlib.asynccontextmanager
    async def _gate(self, upload: str) -> AsyncIterator[_Gate]:
        gate = self._gates.setdefault(upload, _Gate())
        gate.users += 1
        try:
            yield gate
        finally:
            gate.users -= 1
            if not gate.users:
                del self._gates[upload]
