"""Uses, and the graphs that they make."""

from ekiben.registry.v1 import lineage_pb2 as pb
from services.registry.domain import Use
from services.registry.lineage import Graph, Node
from services.registry.messages.catalog import to_timestamp


def owner(message: pb.UseOwner) -> tuple[str, str, str]:
    """Organization as rows hold it, name and uid of an owner."""
    return message.organization.removeprefix("organizations/"), message.name, message.uid


def read_use(message: pb.Use) -> Use:
    """The use that a message tells of."""
    return Use(message.consumer, message.consumer_uid, message.resource, message.digest, message.live)


def use(found: Use) -> pb.Use:
    """The message of a use."""
    return pb.Use(
        consumer=found.consumer,
        consumer_uid=found.consumer_uid,
        resource=found.resource,
        digest=found.digest,
        live=found.live,
        create_time=to_timestamp(found.create_time),
        end_time=to_timestamp(found.end_time),
    )


def graph(found: Graph) -> pb.LineageGraph:
    """The message of a graph."""
    return pb.LineageGraph(
        name=found.name,
        nodes=[_node(node) for node in found.nodes],
        uses=[use(one) for one in found.uses],
        truncated=found.truncated,
    )


def _node(found: Node) -> pb.LineageGraph.Node:
    state = pb.LineageGraph.Node.STATE_UNSPECIFIED
    if found.present is not None:
        gone = pb.LineageGraph.Node.DELETED if found.deleted else pb.LineageGraph.Node.MISSING
        state = pb.LineageGraph.Node.PRESENT if found.present else gone
    return pb.LineageGraph.Node(name=found.name, state=state, digest=found.digest, distance=found.distance)
