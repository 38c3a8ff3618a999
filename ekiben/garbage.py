"""What the collector frees."""

from collections.abc import AsyncIterator

import grpc.aio

from ekiben.registry.v1 import garbage_pb2 as pb
from ekiben.registry.v1.garbage_pb2_grpc import GarbageStub


class Garbage:
    """Bytes that nothing names any more."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = GarbageStub(channel)

    async def collect(self, *, dry_run: bool = False) -> AsyncIterator[pb.GarbageItem]:
        """Run a round of the collector, or say what one would free; for admins."""
        call = self._stub.CollectGarbage(pb.CollectGarbageRequest(dry_run=dry_run))
        try:
            async for item in call:
                yield item
        finally:
            call.cancel()
