"""What uses what: from models over bentos to the revisions of deployments, and to predictions."""

import grpc.aio

from ekiben import names
from ekiben.predictions import Predictions
from ekiben.registry.v1 import lineage_pb2 as pb
from ekiben.registry.v1.lineage_pb2_grpc import LineageStub


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
        graph.name = prediction.name
        for node in graph.nodes:
            node.distance -= 1
        graph.nodes.insert(0, pb.LineageGraph.Node(name=prediction.name))
        made = pb.Use(
            consumer=prediction.name,
            consumer_uid=prediction.name,
            resource=prediction.revision,
            create_time=prediction.start_time,
            end_time=prediction.start_time,
        )
        graph.uses.insert(0, made)
        return graph
