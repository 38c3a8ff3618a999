"""Rounds of the collector over gRPC."""

import contextlib
from collections.abc import AsyncIterator

from ekiben.registry.v1 import garbage_pb2 as pb
from ekiben.registry.v1 import garbage_pb2_grpc
from services.registry.collector import Collector
from services.registry.messages import garbage as messages
from services.registry.servicer.context import Context


class Garbage(garbage_pb2_grpc.GarbageServicer):
    """Serves ekiben.registry.v1.Garbage."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: Context
    ) -> AsyncIterator[pb.GarbageItem]:
        """See the proto."""
        found = self._collector.plan() if request.dry_run else self._collector.sweep()
        async with contextlib.aclosing(found):  # type: ignore[type-var]
            async for one in found:
                yield messages.item(one)
