"""The lineage of a prediction is that of the revision that answered it, at its time."""

from google.protobuf.timestamp_pb2 import Timestamp

from ekiben.lineage import of_prediction
from ekiben.recorder.v1.recorder_pb2 import Prediction
from ekiben.registry.v1 import lineage_pb2 as pb

REVISION = "deployments/demo/revisions/1"
BENTO, CANARY, FORMER = (f"bentoRepositories/svc/bentos/{version}" for version in ("v2", "v3", "v1"))


def use(resource: str, begun: int, ended: int = 0, consumer: str = REVISION) -> pb.Use:
    """A use of these seconds; live where it has no end."""
    found = pb.Use(consumer=consumer, consumer_uid=f"{begun}", resource=resource, live=not ended)
    found.create_time.seconds = begun
    if ended:
        found.end_time.seconds = ended
    return found


def graph() -> pb.LineageGraph:
    """Of a revision whose name an older deployment had too."""
    model = use("modelRepositories/iris/models/v1", 10, consumer=BENTO)
    found = pb.LineageGraph(name=REVISION, uses=[use(BENTO, 1000), use(CANARY, 1000), use(FORMER, 10, 500), model])
    names = {REVISION: 0, BENTO: -1, CANARY: -1, FORMER: -1, "modelRepositories/iris/models/v1": -2}
    found.nodes.extend(pb.LineageGraph.Node(name=name, distance=distance) for name, distance in names.items())
    return found


def at(seconds: int, bento: str) -> pb.LineageGraph:
    """The lineage of a prediction of a time."""
    prediction = Prediction(name="predictions/p", revision=REVISION, bento=bento)
    prediction.start_time.CopyFrom(Timestamp(seconds=seconds))
    return of_prediction(prediction, graph())


def test_a_prediction_uses_its_own_bento_and_the_revision_of_its_time() -> None:
    found = at(2000, CANARY)
    edges = [(use.consumer, use.resource) for use in found.uses]
    assert edges[:2] == [("predictions/p", REVISION), ("predictions/p", CANARY)]
    assert (REVISION, FORMER) not in edges
    assert FORMER not in [node.name for node in found.nodes]
    distances = {node.name: node.distance for node in found.nodes}
    assert (distances["predictions/p"], distances[REVISION], distances[CANARY], distances[BENTO]) == (0, -1, -1, -2)


def test_a_prediction_of_a_former_deployment_of_the_name_uses_what_that_one_had() -> None:
    for seconds in (100, 530):  # the second while the last replica drained
        found = at(seconds, FORMER)
        assert [use.resource for use in found.uses if use.consumer == REVISION] == [FORMER]


def test_a_prediction_whose_uses_are_forgotten_still_shows_its_bento() -> None:
    found = at(700, "bentoRepositories/svc/bentos/gone")
    assert "bentoRepositories/svc/bentos/gone" in [node.name for node in found.nodes]
