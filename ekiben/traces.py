"""What each hop of a request did."""

from collections.abc import AsyncIterator
from datetime import datetime

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben import pages
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1.recorder_pb2_grpc import TracesStub


class Traces:
    """Traces: all that happened for one request, as spans."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = TracesStub(channel)

    async def get(self, name: str) -> pb.Trace:
        """One trace with all its spans: `traces/{32 hex digits}`."""
        return await self._stub.GetTrace(pb.GetTraceRequest(name=name))

    def list(
        self, *, since: datetime | None = None, service: str = "", errors_only: bool = False, limit: int = 0
    ) -> AsyncIterator[pb.Trace]:
        """Traces, newest first, without their spans."""
        request = pb.ListTracesRequest(service=service, errors_only=errors_only)
        if since is not None:
            start = Timestamp()
            start.FromDatetime(since)
            request.start_time.CopyFrom(start)
        return pages.items(self._stub.ListTraces, request, "traces", limit=limit)
