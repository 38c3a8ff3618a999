"""`ekiben clusters` and `ekiben instance-types`: where replicas run, and the sizes they may have."""

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import limit_option, output_option
from ekiben.cli.output import last, moment, print_item, print_items, size
from ekiben.cli.session import run
from ekiben.client import Client


@click.group(cls=NounGroup)
def clusters() -> None:
    """Clusters: where replicas run."""


@clusters.command("list")
@limit_option
@output_option
@run
async def list_clusters(client: Client, limit: int, output: str) -> None:
    """List clusters."""
    columns = [
        ("CLUSTER", lambda c: last(c.name)),
        ("RUNTIME", lambda c: c.runtime),
        ("DESCRIPTION", lambda c: c.description),
    ]
    print_items((await client.clusters.list())[: limit or None], columns, output)


@clusters.command("get")
@click.argument("cluster")
@output_option
@run
async def get_cluster(client: Client, cluster: str, output: str) -> None:
    """Show one CLUSTER."""
    found = await client.clusters.get(short.resource("clusters", cluster))
    shown = [
        ("Cluster", last(found.name)),
        ("Runtime", found.runtime),
        ("Description", found.description),
        ("Created", moment(found.create_time)),
    ]
    print_item(found, shown, output)


@click.group(cls=NounGroup)
def instance_types() -> None:
    """Instance types: sizes that a service may ask for."""


@instance_types.command("list")
@click.option("--cluster", default="", help="Those of this cluster.")
@limit_option
@output_option
@run
async def list_instance_types(client: Client, cluster: str, limit: int, output: str) -> None:
    """List instance types."""
    columns = [
        ("INSTANCE TYPE", lambda t: t.display_name),
        ("CPU", lambda t: f"{t.cpu_millicores / 1000:g}" if t.cpu_millicores else ""),
        ("MEMORY", lambda t: size(t.memory_bytes) if t.memory_bytes else ""),
        ("GPU", lambda t: f"{t.gpu_count} {t.gpu_type}".strip() if t.gpu_count else ""),
        ("DESCRIPTION", lambda t: t.description),
    ]
    named = short.resource("clusters", cluster) if cluster else ""
    print_items((await client.clusters.instance_types(cluster=named))[: limit or None], columns, output)
