"""`ekiben lineage`: what a resource uses, and what uses it."""

from collections.abc import Iterator, Sequence

import click

from ekiben import names
from ekiben.cli import short
from ekiben.cli.options import output_option
from ekiben.cli.output import as_data, dump, last, moment, tag
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.errors import InvalidArgument, NotFound
from ekiben.registry.v1 import lineage_pb2 as pb

_STATES = {pb.LineageGraph.Node.DELETED: "deleted, can be restored", pb.LineageGraph.Node.MISSING: "not there"}


@click.command()
@click.argument("resource")
@click.option("--live", is_flag=True, help="Leave out what ended: former revisions, deleted bentos.")
@output_option
@run
async def lineage(client: Client, resource: str, live: bool, output: str) -> None:
    """Show what a RESOURCE uses, and what uses it, directly or through others.

    A RESOURCE is a tag (iris:v1) of a model or a bento, a deployment (demo), or any resource name: of a model, bento,
    build, deployment, revision or prediction.

    \b
    ekiben lineage iris:v1                                # which bentos and deployments use this model?
    ekiben lineage demo --live                            # what does this deployment run now?
    ekiben lineage predictions/PREDICTION                 # which model gave this answer?
    """
    graph = await _find(client, resource, live_only=live)
    if len(graph.nodes) == 1 and graph.name.startswith("deployments/") and "/revisions/" not in graph.name:
        await client.deployments.get(
            graph.name
        )  # A deployment runs something: this one was never there, or all is over.
    if output in ("json", "yaml"):
        click.echo(dump(as_data(graph), output))
    elif output == "name":
        for node in graph.nodes:
            click.echo(node.name)
    else:
        print_graph(graph)


async def _find(client: Client, text: str, *, live_only: bool) -> pb.LineageGraph:
    if "/" in text:
        return await client.lineage.get(text, live_only=live_only)
    if ":" not in text:
        return await client.lineage.get(short.resource("deployments", text), live_only=live_only)
    found = []
    for name in (short.bento(text), short.model(text)):
        try:
            found.append(await client.lineage.get(name, live_only=live_only))
        except NotFound as exc:
            missing = exc
    if len(found) == 2:
        raise InvalidArgument(
            f"{text} is a bento and a model. Say {found[0].name} or {found[1].name}.", reason="NAME_AMBIGUOUS"
        )
    if not found:
        raise missing
    return found[0]


def print_graph(graph: pb.LineageGraph) -> None:
    """Print a graph as two trees below its resource."""
    nodes = {node.name: node for node in graph.nodes}
    click.echo(click.style(shown(graph.name), bold=True) + _remark(nodes[graph.name]))
    for title, down in (("uses", False), ("used by", True)):
        lines = list(_tree(graph, nodes, graph.name, down=down, depth=1, seen={graph.name}))
        if lines:
            click.echo(f"  {title}")
            for line in lines:
                click.echo(line)
    if len(graph.nodes) == 1:
        click.echo("  uses nothing, and nothing uses it")
    if graph.truncated:
        click.echo("  and more: only the newest are shown", err=True)
    revisions = [node.name for node in graph.nodes if "/revisions/" in node.name]
    if revisions and graph.name.partition("/")[0] != "predictions":
        one = revisions[0].split("/")
        click.echo(click.style(f"\nIts predictions: ekiben predictions list --revision {one[1]}/{one[3]}", dim=True))


def _tree(
    graph: pb.LineageGraph, nodes: dict[str, pb.LineageGraph.Node], name: str, *, down: bool, depth: int, seen: set[str]
) -> Iterator[str]:
    for use, other in _edges(graph.uses, name, down=down):
        node = nodes.get(other, pb.LineageGraph.Node(name=other))
        time = "live" if use.live else f"until {moment(use.end_time)}" if use.HasField("end_time") else ""
        yield "  " * (depth + 1) + f"{shown(other)}{_remark(node)}" + (click.style(f"  {time}", dim=True))
        if other not in seen:
            seen.add(other)
            yield from _tree(graph, nodes, other, down=down, depth=depth + 1, seen=seen)


def _edges(uses: Sequence[pb.Use], name: str, *, down: bool) -> list[tuple[pb.Use, str]]:
    found: dict[str, pb.Use] = {}
    for use in uses:  # live ones first: of several that had one name the live one is shown
        if (use.resource if down else use.consumer) == name:
            found.setdefault(use.consumer if down else use.resource, use)
    return [(use, other) for other, use in sorted(found.items())]


def _remark(node: pb.LineageGraph.Node) -> str:
    return f" ({_STATES[node.state]})" if node.state in _STATES else ""


def shown(name: str) -> str:
    """A resource as people say it: `model iris:v1`, `deployment demo, revision 3`."""
    kind, parts = name.partition("/")[0], name.split("/")
    if kind == "modelRepositories":
        return f"model {tag(name)}"
    if kind == "bentoRepositories":
        return f"bento {tag(name)}"
    if len(parts) == 4:
        revision = names.Revision.parse(name)
        return f"deployment {revision.deployment}, revision {revision.revision}"
    return f"{kind.removesuffix('s')} {last(name)}"
