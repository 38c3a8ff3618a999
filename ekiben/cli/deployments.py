"""`ekiben deployments`: bentos that are kept running and reachable."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from ekiben.cli import pods, short, templates
from ekiben.cli.bentos import get_or_push
from ekiben.cli.events import events
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import DURATION, TIME, F, confirm, limit_option, lines_option, output_option, yes_option
from ekiben.cli.output import age, as_data, collect, last, moment, pairs, print_item, print_items, said, tag
from ekiben.cli.rollouts import follow, ready, state
from ekiben.cli.session import run
from ekiben.cli.templates import Flags, Services, flag_options
from ekiben.cli.terminals import debug, exec_, recordings
from ekiben.client import Client
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import images_pb2
from ekiben.deployments import serving
from ekiben.registry.v1 import registry_pb2

COLUMNS = [
    ("DEPLOYMENT", lambda d: last(d.name)),
    ("STATE", state),
    ("READY", ready),
    ("BENTO", lambda d: tag(d.template.bento)),
    ("REVISION", lambda d: last(d.latest_revision)),
    ("URL", lambda d: d.urls[0] if d.urls else ""),
    ("AGE", lambda d: age(d.create_time)),
]


def fields(deployment: pb.Deployment) -> list[tuple[str, str]]:
    """What `get` prints."""
    template, capture = deployment.template, deployment.capture
    return [
        ("Deployment", last(deployment.name)),
        ("State", state(deployment)),
        ("Cluster", "/".join(filter(None, (last(deployment.cluster), deployment.kubernetes_namespace)))),
        ("Bento", tag(template.bento)),
        ("Image", template.image.reference),
        ("Models", "mounted" if template.model_delivery == images_pb2.IMAGE_VOLUME else ""),
        ("Canary", _canary(template.canary)),
        ("URL", "\n".join(deployment.urls)),
        ("Ready", "\n".join(f"{s}  {c.ready}/{c.desired}" for s, c in sorted(deployment.replica_counts.items()))),
        ("Revision", _revisions(deployment)),
        ("Conditions", "\n".join(_condition(condition) for condition in deployment.conditions)),
        ("Env", "\n".join(f"{env.name}={env.value}" for env in template.envs)),
        ("Pods", pods.shown(template)),
        ("Secrets", " ".join(last(secret) for secret in template.secrets)),
        ("Capture", _capture(capture)),
        ("Exposed as", _exposure(deployment)),
        ("Access", "API token required" if deployment.access_authorization else ""),
        ("Labels", pairs(deployment.labels)),
        ("Created", f"{moment(deployment.create_time)} by {last(deployment.creator)}"),
        ("Updated", moment(deployment.update_time)),
    ]


async def _settle_bentos(client: Client, deployment: pb.Deployment, *, canaries: bool) -> registry_pb2.Bento:
    """Make the bento of a deployment what it stands for now, and those of its canaries. Gives the former."""
    template = deployment.template
    found = await get_or_push(client, template.bento)
    template.bento = found.name
    for _, version in sorted(template.canary.versions.items()):
        if canaries and version.bento:
            version.bento = (await get_or_push(client, version.bento)).name
    return found


def _canary(canary: pb.Canary) -> str:
    """Each version with its share of the requests, and by what they are told apart."""
    by = f" by {canary.route_type} {canary.route_by}" if canary.route_by else ""
    return "\n".join(
        f"{name}  {tag(version.bento)}  {version.weight_percent} %{by}"
        for name, version in sorted(canary.versions.items())
    )


def _revisions(deployment: pb.Deployment) -> str:
    latest, serves = last(deployment.latest_revision), last(deployment.serving_revision)
    return latest if latest == serves or not serves else f"{latest} ({serves} gets the requests)"


def _condition(condition: pb.Condition) -> str:
    status = {pb.Condition.TRUE: "yes", pb.Condition.FALSE: "no"}.get(condition.status, "?")
    return f"{condition.type}: {status}" + (f", {condition.message}" if condition.message else "")


def _capture(capture: pb.CapturePolicy) -> str:
    if capture.disabled:
        return "off"
    percent = capture.sample_percent if capture.HasField("sample_percent") else 100
    limit = capture.max_body_bytes if capture.HasField("max_body_bytes") else 64 << 10
    return f"{percent:g} % of predictions, bodies up to {limit} bytes"


def _exposure(deployment: pb.Deployment) -> str:
    """What was asked for; the condition tells what came of it."""
    if not deployment.HasField("exposure"):
        return ""
    exposure = deployment.exposure
    kind = type(exposure).Kind.Name(exposure.kind)
    return " ".join(filter(None, [kind, exposure.host + exposure.path, "with TLS" if exposure.HasField("tls") else ""]))


def wait_options(function: F) -> F:
    """`--wait/--no-wait` and `--timeout`."""
    function = click.option("--timeout", type=DURATION, default="15m", show_default=True, help="How long to wait.")(
        function
    )
    return click.option("--wait/--no-wait", default=True, help="Wait until it answers, or cannot.")(function)


@click.group(cls=NounGroup)
def deployments() -> None:
    """Deployments: bentos that are kept running and reachable."""


@deployments.command("list")
@click.option(
    "--filter", "filter_", default="", help="Words, label:KEY=VALUE and is:dev terms, all of which must match."
)
@limit_option
@output_option
@run
async def list_(client: Client, filter_: str, limit: int, output: str) -> None:
    """List deployments, newest first."""
    found = await collect(client.deployments.list(filter=filter_, limit=limit))
    print_items(found, COLUMNS, output, empty="No deployments yet. `ekiben deployments create BENTO` makes one.")


@deployments.command()
@click.argument("deployment")
@output_option
@run
async def get(client: Client, deployment: str, output: str) -> None:
    """Show one DEPLOYMENT, and what is right and wrong with it."""
    found = await client.deployments.get(short.resource("deployments", deployment))
    print_item(found, fields(found), output)


@deployments.command()
@click.argument("bento", required=False)
@click.option("-n", "--name", default="", help="Its name; made up from the bento's when left out.")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML or JSON; flags win over it.",
)
@click.option("--cluster", default="", help="Where it runs; `default` when left out.")
@click.option("--kubernetes-namespace", default="", help="A namespace of that cluster; its first one when left out.")
@flag_options
@click.option("--dry-run", is_flag=True, help="Only check the request.")
@wait_options
@output_option
@run
async def create(
    client: Client,
    bento: str | None,
    name: str,
    file: Path | None,
    dry_run: bool,
    wait: bool,
    cluster: str,
    kubernetes_namespace: str,
    timeout: float,
    output: str,
    **rest: Any,
) -> int:
    """Deploy a BENTO: build its environment, start its replicas, and wait until they answer.

    A bento that only the local BentoML store has is pushed first.

    \b
    ekiben deployments create summarizer --name demo
    ekiben deployments create summarizer:v2 --env LOG_LEVEL=debug --secret hub --replicas 2
    ekiben deployments create --file deployment.yaml
    """
    wanted = templates.read_file(file) if file else pb.Deployment()
    if name:
        wanted.name = short.resource("deployments", name)
    if cluster:
        wanted.cluster = short.resource("clusters", cluster)
    if kubernetes_namespace:
        wanted.kubernetes_namespace = kubernetes_namespace
    if bento:
        wanted.template.bento = short.bento(bento)
    if not wanted.template.bento:
        raise click.UsageError("Say which bento: `ekiben deployments create BENTO`, or name it in --file.")
    found = await _settle_bentos(client, wanted, canaries=True)
    templates.apply(wanted, Flags.take(rest), Services.of(found))
    made = await client.deployments.create(wanted, validate_only=dry_run)
    if dry_run:
        said("The request is good; nothing was created.")
        return 0
    return await _finish(client, made, wait, timeout, output, f"Created deployment {last(made.name)}.")


@deployments.command()
@click.argument("deployment")
@click.option("-b", "--bento", default="", help="The bento to run from now on.")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML or JSON; flags win over it.",
)
@flag_options
@click.option("--unset-env", "unset_envs", multiple=True, metavar="KEY", help="The same as --env KEY-.")
@click.option("--dry-run", is_flag=True, help="Only check the request.")
@wait_options
@output_option
@run
async def update(
    client: Client,
    deployment: str,
    bento: str,
    file: Path | None,
    dry_run: bool,
    wait: bool,
    timeout: float,
    output: str,
    **rest: Any,
) -> int:
    """Change a DEPLOYMENT. What changes its template rolls out a new revision; a terminated one starts again.

    What was set is taken back by `KEY-` in place of KEY=VALUE, by `default` or by an empty value, as each option says.

    \b
    ekiben deployments update demo --bento summarizer:v2
    ekiben deployments update demo --env LOG_LEVEL=info --env DEBUG-
    ekiben deployments update demo --node-selector disk- --limit nvidia.com/gpu- --scale default
    """
    name = short.resource("deployments", deployment)
    now = await client.deployments.get(name)
    wanted = pb.Deployment()
    wanted.CopyFrom(now)
    if file:
        given = templates.read_file(file)
        for field in templates.WRITABLE:
            templates.copy_field(field, given, wanted)
        if not wanted.template.bento:
            wanted.template.bento = now.template.bento
    if bento:
        wanted.template.bento = short.bento(bento)
    found = await _settle_bentos(client, wanted, canaries=file is not None)
    templates.apply(wanted, Flags.take(rest), Services.of(found))
    paths = templates.changed_paths(now, wanted)
    if not paths and not now.terminated:
        said(f"Deployment {last(name)} is so already.")
        return 0
    changed = await client.deployments.update(wanted, paths or ["template"], validate_only=dry_run)
    if dry_run:
        said(f"The request is good; it would change {', '.join(paths)}.")
        return 0
    return await _finish(client, changed, wait, timeout, output, f"Updated deployment {last(name)}.")


@deployments.command()
@click.argument("deployment")
@click.argument("revision", required=False)
@wait_options
@output_option
@run
async def rollback(
    client: Client, deployment: str, revision: str | None, wait: bool, timeout: float, output: str
) -> int:
    """Go back to a REVISION of a DEPLOYMENT, or to the one before the latest."""
    name = short.resource("deployments", deployment)
    changed = await client.deployments.rollback(name, short.revision(name, revision) if revision else "")
    return await _finish(client, changed, wait, timeout, output, f"Rolling {last(name)} back.")


@deployments.command()
@click.argument("deployment")
@click.argument("replicas", type=click.IntRange(1, 1000))
@click.option("--service", default="", help="Which service; the entry service when left out.")
@wait_options
@output_option
@run
async def scale(
    client: Client, deployment: str, replicas: int, service: str, wait: bool, timeout: float, output: str
) -> int:
    """Give a DEPLOYMENT so many REPLICAS."""
    name = short.resource("deployments", deployment)
    changed = await client.deployments.scale(name, replicas, service=service)
    return await _finish(client, changed, wait, timeout, output, f"Scaling {last(name)} to {replicas}.")


@deployments.command()
@click.argument("deployment")
@click.option("--timeout", type=DURATION, default="15m", show_default=True, help="How long to wait.")
@output_option
@run
async def wait(client: Client, deployment: str, timeout: float, output: str) -> int:
    """Wait until a DEPLOYMENT serves what is desired. Exit code 1 where it cannot."""
    found = await follow(client, short.resource("deployments", deployment), timeout)
    if output != "table":
        print_item(found, fields(found), output)
    return 0 if serving(found) else 1


@deployments.command()
@click.argument("deployment")
@click.option("-f", "--follow", "follow_", is_flag=True, help="Go on with what comes.")
@click.option("--service", default="", help="Only this service.")
@click.option("-r", "--replica", default="", help="Only this replica.")
@click.option(
    "--tail", type=int, help="Only the last so many lines of each replica; 0 is none, -1 all. 100 without --since."
)
@click.option("--since", type=TIME, help="Only what was printed since: 15m (ago), 2026-01-31, 2026-01-31T12:00:00Z.")
@click.option("-p", "--previous", is_flag=True, help="Only what was printed before the last start of each replica.")
@click.option("--timestamps", is_flag=True, help="Print when each line was printed.")
@click.option("--no-prefix", is_flag=True, help="Leave out which replica printed it.")
@lines_option
@run
async def logs(
    client: Client,
    deployment: str,
    follow_: bool,
    service: str,
    replica: str,
    tail: int | None,
    since: datetime | None,
    previous: bool,
    timestamps: bool,
    no_prefix: bool,
    output: str,
) -> None:
    """Print what the replicas of a DEPLOYMENT printed.

    \b
    ekiben deployments logs demo --since 10m
    ekiben deployments logs demo --tail 0 --follow
    """
    colours = ("cyan", "magenta", "blue", "yellow", "green")
    seen: dict[str, int] = {}
    name, silent = short.resource("deployments", deployment), not follow_ and tail != 0
    async for line in client.deployments.logs(
        name, service=service, replica=replica, follow=follow_, tail_lines=tail, since=since, previous=previous
    ):
        silent = False
        if output == "json":
            click.echo(json.dumps(as_data(line), ensure_ascii=False))
            continue
        colour = colours[seen.setdefault(line.replica, len(seen)) % len(colours)]
        prefix = "" if no_prefix else click.style(line.replica, fg=colour) + " | "
        click.echo((f"{moment(line.time)} " if timestamps else "") + prefix + line.text)
    if silent:
        said(f"Nothing of the kind was printed; `ekiben deployments replicas {last(name)}` shows who could have.")


deployments.add_command(events)
for _command in (exec_, debug, recordings):
    deployments.add_command(_command)


@deployments.command()
@click.argument("deployment")
@output_option
@run
async def replicas(client: Client, deployment: str, output: str) -> None:
    """List the replicas of a DEPLOYMENT."""
    columns = [
        ("REPLICA", lambda r: r.replica),
        ("SERVICE", lambda r: r.service),
        ("REVISION", lambda r: last(r.revision)),
        ("TARGET", lambda r: r.target),
        ("STATE", lambda r: pb.Replica.State.Name(r.state)),
        ("RESTARTS", lambda r: str(r.restart_count)),
        ("AGE", lambda r: age(r.start_time)),
        ("MESSAGE", lambda r: r.message.partition("\n")[0]),
    ]
    found = await client.deployments.replicas(short.resource("deployments", deployment))
    if output == "name":
        for replica in found:
            click.echo(replica.replica)
        return
    print_items(found, columns, output, empty="It has no replicas.")


@deployments.command()
@click.argument("deployment")
@limit_option
@output_option
@run
async def revisions(client: Client, deployment: str, limit: int, output: str) -> None:
    """List the revisions of a DEPLOYMENT, newest first."""
    columns = [
        ("REVISION", lambda r: last(r.name)),
        ("BENTO", lambda r: tag(r.template.bento)),
        ("SERVING", lambda r: "yes" if r.serving else ""),
        ("ROLLED BACK TO", lambda r: last(r.rolled_back_to)),
        ("CREATOR", lambda r: last(r.creator)),
        ("AGE", lambda r: age(r.create_time)),
    ]
    name = short.resource("deployments", deployment)
    print_items(await collect(client.deployments.revisions(name, limit=limit)), columns, output)


@deployments.command()
@click.argument("deployment")
@yes_option
@wait_options
@run
async def terminate(client: Client, deployment: str, yes: bool, wait: bool, timeout: float) -> None:
    """Stop every replica of a DEPLOYMENT; `update` starts it again."""
    name = short.resource("deployments", deployment)
    confirm(f"Stop every replica of {last(name)}?", yes)
    await client.deployments.terminate(name)
    if wait:
        await client.deployments.wait_terminated(name, timeout_s=timeout)
    said(f"{'Terminated' if wait else 'Terminating'} deployment {last(name)}.")


@deployments.command()
@click.argument("deployment")
@yes_option
@wait_options
@run
async def delete(client: Client, deployment: str, yes: bool, wait: bool, timeout: float) -> None:
    """Stop and delete a DEPLOYMENT with its revisions. Its predictions stay."""
    name = short.resource("deployments", deployment)
    confirm(f"Delete deployment {last(name)} and its revisions?", yes)
    await client.deployments.delete(name)
    if wait:
        await client.deployments.wait_deleted(name, timeout_s=timeout)
    said(f"{'Deleted' if wait else 'Deleting'} deployment {last(name)}.")


async def _finish(
    client: Client, deployment: pb.Deployment, wait: bool, timeout_s: float, output: str, message: str
) -> int:
    """What create, update, rollback and scale end in: follow it, then print it."""
    said(message)
    good = True
    if wait:
        deployment = await follow(client, deployment.name, timeout_s)
        good = serving(deployment)
    if output != "table":
        print_item(deployment, fields(deployment), output)
    elif good:
        for url in deployment.urls[:1]:
            click.echo(url)
    return 0 if good else 1
