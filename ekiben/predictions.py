"""The prediction log: find, read and tail what was predicted."""

from collections.abc import AsyncIterator
from datetime import datetime

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben import pages, watches
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsStub


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


class Predictions:
    """Predictions: requests to deployments with their responses."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = PredictionsStub(channel)

    async def get(self, name: str) -> pb.Prediction:
        """One prediction with headers, bodies and monitor entries."""
        return await self._stub.GetPrediction(pb.GetPredictionRequest(name=name))

    def list(
        self,
        *,
        deployment: str = "",
        revision: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        status: str = "",
        trace_id: str = "",
        include_bodies: bool = False,
        limit: int = 0,
    ) -> AsyncIterator[pb.Prediction]:
        """Predictions, newest first. Times are aware datetimes; `status` is `200` or a class, `5xx`."""
        request = pb.ListPredictionsRequest(
            deployment=deployment,
            revision=revision,
            start_time=_timestamp(since),
            end_time=_timestamp(until),
            status=status,
            trace_id=trace_id,
            include_bodies=include_bodies,
        )
        return pages.items(self._stub.ListPredictions, request, "predictions", limit=limit)

    def tail(
        self, *, deployment: str = "", status: str = "", include_bodies: bool = False
    ) -> AsyncIterator[pb.Prediction]:
        """Predictions as they come, until the caller leaves. Those of a time without a server are not given."""
        request = pb.TailPredictionsRequest(deployment=deployment, status=status, include_bodies=include_bodies)
        return watches.resume(lambda: self._stub.TailPredictions(request))
