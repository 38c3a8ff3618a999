"""`ekiben clusters` and `ekiben instance-types`: where replicas run, and the sizes they may have."""

from collections.abc import Mapping
from typing import Any

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import confirm, limit_option, output_option, yes_option
from ekiben.cli.output import last, moment, print_item, print_items, size
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.deployer.v1 import deployer_pb2


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
        ("SERVER", lambda c: c.server),
        ("NAMESPACES", lambda c: ", ".join(c.namespaces)),
        ("DESCRIPTION", lambda c: c.description),
        ("DETAIL", lambda c: c.detail),
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
        ("Server", found.server),
        ("Namespaces", ", ".join(found.namespaces)),
        ("Pull host", found.pull_host),
        ("Pull secret", found.pull_secret),
        ("Telemetry", found.otlp_http_endpoint),
        ("Description", found.description),
        ("Detail", found.detail),
        ("Created", moment(found.create_time)),
        ("Changed", moment(found.update_time) if found.HasField("update_time") else ""),
    ]
    print_item(found, shown, output)


_kubeconfig = click.option(
    "--kubeconfig",
    type=click.File("r"),
    help="A kubeconfig with its credentials inside (`kubectl config view --minify --flatten --raw`); - for standard "
    "input. Kept encrypted, and never given back.",
)
_context = click.option(
    "--kubeconfig-context", default="", help="The context of the kubeconfig; its current one when left out."
)
_namespaces = click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    help="A namespace in which deployments may be; repeat it for more. The first is that of deployments which name "
    "none.  [default: ekiben]",
)
_pull_host = click.option("--pull-host", help="HOST[:PORT] under which its nodes reach the platform's /v2/.")
_pull_secret = click.option("--pull-secret", help="Secret of each namespace with the login for images.")
_otlp = click.option(
    "--otlp-http-endpoint",
    help="http://HOST:PORT under which its pods reach the recorder, for spans and monitored values.",
)
_description = click.option("--description", help="Free text.")


@clusters.command("create")
@click.argument("cluster")
@_kubeconfig
@click.option("--in-cluster", is_flag=True, help="Instead of a kubeconfig: the identity of the deployer's own pod.")
@_context
@_namespaces
@_pull_host
@_pull_secret
@_otlp
@_description
@output_option
@run
async def create_cluster(client: Client, cluster: str, in_cluster: bool, output: str, **given: Any) -> None:
    """Add a Kubernetes CLUSTER, and say whether it answers."""
    if in_cluster == (given["kubeconfig"] is not None):
        raise click.UsageError("Give either --kubeconfig FILE or --in-cluster.")
    made, _ = _given(cluster, given)
    print_item(await client.clusters.create(made), [("Created", cluster)], output)
    await _say(client, made.name)


@clusters.command("update")
@click.argument("cluster")
@_kubeconfig
@_context
@_namespaces
@_pull_host
@_pull_secret
@_otlp
@_description
@output_option
@run
async def update_cluster(client: Client, cluster: str, output: str, **given: Any) -> None:
    """Change a CLUSTER: its credentials, say. What runs there goes on."""
    changed, paths = _given(cluster, given)
    if not paths:
        raise click.UsageError("Say what to change; see --help.")
    print_item(await client.clusters.update(changed, paths), [("Changed", ", ".join(paths))], output)
    await _say(client, changed.name)


@clusters.command("delete")
@click.argument("cluster")
@yes_option
@run
async def delete_cluster(client: Client, cluster: str, yes: bool) -> None:
    """Remove a CLUSTER without deployments. What is there stays."""
    confirm(f"Remove the cluster {cluster}?", yes)
    await client.clusters.delete(short.resource("clusters", cluster))
    click.echo(f"{cluster} is removed.")


@clusters.command("check")
@click.argument("cluster")
@run
async def check_cluster(client: Client, cluster: str) -> None:
    """Ask a CLUSTER whether it answers, has its namespaces, and gives the credentials all rights that are needed."""
    if not await _say(client, short.resource("clusters", cluster)):
        raise click.exceptions.Exit(1)


@clusters.command("roles")
@click.argument("cluster")
@click.option("--service-account", default="", help="Who gets them: NAMESPACE/NAME.  [default: NAMESPACE/ekiben]")
@run
async def cluster_roles(client: Client, cluster: str, service_account: str) -> None:
    """Print the Role and RoleBinding that a CLUSTER needs, for `kubectl apply -f -`."""
    named = short.resource("clusters", cluster)
    click.echo(await client.clusters.roles(named, service_account=service_account), nl=False)


def _given(cluster: str, given: Mapping[str, Any]) -> tuple[deployer_pb2.Cluster, list[str]]:
    """The cluster with what was given, and which fields these are."""
    made = deployer_pb2.Cluster(name=short.resource("clusters", cluster), context=given["kubeconfig_context"])
    paths = []
    if given["kubeconfig"] is not None:
        made.kubeconfig = given["kubeconfig"].read()
        paths.append("kubeconfig")
    if given["namespaces"]:
        made.namespaces.extend(given["namespaces"])
        paths.append("namespaces")
    for field in ("pull_host", "pull_secret", "otlp_http_endpoint", "description"):
        if given[field] is not None:
            setattr(made, field, given[field])
            paths.append(field)
    return made, paths


async def _say(client: Client, name: str) -> bool:
    """How the cluster is, in words on standard error."""
    found = await client.clusters.check(name)
    if not found.reachable:
        click.echo(f"It does not answer: {found.message}", err=True)
        return False
    click.echo(f"It answers: Kubernetes {found.version}.", err=True)
    for right in found.missing:
        click.echo(f"The credentials do not allow: {right}", err=True)
    if found.missing:
        click.echo(f"`ekiben clusters roles {last(name)}` prints the roles that do.", err=True)
    for namespace in found.absent_namespaces:
        click.echo(f"There is no namespace {namespace} in it: kubectl create namespace {namespace}", err=True)
    return not found.missing and not found.absent_namespaces


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
        ("PRICE", lambda t: t.price),
        ("DESCRIPTION", lambda t: t.description),
    ]
    named = short.resource("clusters", cluster) if cluster else ""
    print_items((await client.clusters.instance_types(cluster=named))[: limit or None], columns, output)
