"""What uses what: from models over bentos to the revisions of deployments, and to predictions."""

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben import names
from ekiben.predictions import Predictions
from ekiben.recorder.v1.recorder_pb2 import Prediction
from ekiben.registry.v1 import lineage_pb2 as pb
from ekiben.registry.v1.lineage_pb2_grpc import LineageStub

_DRAINING_NS = 60 * 10**9
"""A replica that drains may still answer when the use of its revision has been reported as ended."""


class Lineage:
    """What is connected with a resource."""

    def __init__(self, channel: grpc.aio.Channel, predictions: Predictions) -> None:
        self._stub, self._predictions = LineageStub(channel), predictions

    async def get(self, name: str, *, live_only: bool = False) -> pb.LineageGraph:
        """All that a resource uses and all that uses it: of a model, bento, build, deployment, revision or prediction.

        A prediction's graph is that of the revision that answered, with the prediction before it. The other way, the
        predictions of a revision are what `Client.predictions.list(revision=…)` gives.
        """
        if not name.startswith("predictions/"):
            return await self._stub.GetLineage(pb.GetLineageRequest(name=name, live_only=live_only))
        prediction = await self._predictions.get(str(names.Prediction.parse(name)))
        graph = await self._stub.GetLineage(pb.GetLineageRequest(name=prediction.revision, live_only=live_only))
        return of_prediction(prediction, graph)


def of_prediction(prediction: Prediction, graph: pb.LineageGraph) -> pb.LineageGraph:
    """The graph of the revision that answered, with the prediction before it.

    Of several revisions that had its name, as after a deployment was deleted and made again, that of its time is kept.
    The prediction uses its bento too: the revision may have more than one.
    """
    then = [use for use in graph.uses if use.consumer != prediction.revision or _was(use, prediction.start_time)]
    if any(use.consumer == prediction.revision for use in then):
        del graph.uses[:]
        graph.uses.extend(then)
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        node.distance -= 1
    found = pb.LineageGraph(name=prediction.name, truncated=graph.truncated)
    found.nodes.add(name=prediction.name)
    for resource in filter(None, (prediction.revision, prediction.bento)):
        found.uses.add(
            consumer=prediction.name,
            consumer_uid=prediction.name,
            resource=resource,
            create_time=prediction.start_time,
            end_time=prediction.start_time,
        )
        if resource not in nodes:
            graph.nodes.add(name=resource, distance=-1)
        elif nodes[resource].distance < -1:
            nodes[resource].distance = -1
    found.uses.extend(graph.uses)
    used = {use.resource for use in found.uses}
    found.nodes.extend(sorted((node for node in graph.nodes if node.name in used), key=lambda n: (-n.distance, n.name)))
    return found


def _was(use: pb.Use, time: Timestamp) -> bool:
    begun = use.create_time.ToNanoseconds() <= time.ToNanoseconds()
    return begun and (use.live or time.ToNanoseconds() <= use.end_time.ToNanoseconds() + _DRAINING_NS)
