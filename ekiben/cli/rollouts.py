"""How a deployment comes to run, shown step by step."""

import asyncio

import click

from ekiben.cli import builds
from ekiben.cli.output import last, said, tag
from ekiben.cli.progress import Steps
from ekiben.client import Client
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployments import serving
from ekiben.errors import EkibenError


def state(deployment: pb.Deployment) -> str:
    """The state's name."""
    return pb.Deployment.State.Name(deployment.state)


def ready(deployment: pb.Deployment) -> str:
    """`2/3`: replicas that answer, of those that there should be, over all services."""
    counts = deployment.replica_counts.values()
    return f"{sum(c.ready for c in counts)}/{sum(c.desired for c in counts)}"


async def follow(client: Client, name: str, timeout_s: float) -> pb.Deployment:
    """Follow a deployment until it serves what is desired or cannot; why it cannot is printed.

    Raises:
        DeadlineExceeded: neither within `timeout_s`; the deployment goes on.
    """
    deployment = pb.Deployment(name=name)
    building = ""
    try:
        with Steps() as steps:
            async for deployment in client.deployments.follow(name, timeout_s=timeout_s):
                if deployment.state == pb.Deployment.BUILDING and deployment.build and deployment.build != building:
                    building = deployment.build
                    await _show_build(client, building, steps, timeout_s)
                steps.now(describe(deployment))
            if serving(deployment):
                where = f" at {deployment.urls[0]}" if deployment.urls else ""
                steps.done(f"{last(name)} runs {tag(deployment.template.bento)}{where}")
    except asyncio.CancelledError:
        said(f"{last(name)} goes on without you: `ekiben deployments wait {last(name)}` follows it again.")
        raise
    if not serving(deployment):
        await print_failure(client, deployment)
    return deployment


async def _show_build(client: Client, build: str, steps: Steps, timeout_s: float) -> None:
    """Show a build while it goes on. What becomes of it the deployment tells, so a lost build is no error here."""
    try:
        async for found in client.builds.follow(build, timeout_s=timeout_s):
            steps.now(builds.describe(found))
        if found.state == found.SUCCEEDED:
            steps.done(f"Built {tag(found.bento)}" + (" (cached)" if found.cached else ""))
    except EkibenError as error:
        steps.now(f"Building: {error}")


def describe(deployment: pb.Deployment) -> str:
    """What a deployment is doing, as a line."""
    name, now = last(deployment.name), state(deployment)
    for condition in deployment.conditions:
        if condition.type == "Progressing" and condition.message:
            return f"{name}: {condition.message.splitlines()[0].removesuffix(' Its last lines:')}"
    return f"{name}: {now.lower().replace('_', ' ')}, {ready(deployment)} replicas ready"


async def print_failure(client: Client, deployment: pb.Deployment) -> None:
    """Print why a deployment does not serve: the build that failed with the end of its log, else its conditions."""
    name = last(deployment.name)
    said(click.style(f"{name} is {state(deployment)}.", fg="red", bold=True))
    wrong = [condition for condition in deployment.conditions if condition.status == pb.Condition.FALSE]
    if deployment.build and any(condition.type == "Built" for condition in wrong):
        build = await client.builds.get(deployment.build)
        if build.state == build.FAILED:
            await builds.print_failure(client, build)
            return
    shown: set[str] = set()
    for condition in wrong:
        first, _, rest = (condition.message or condition.reason).partition("\n")
        if first not in shown:
            said(f"{condition.type}: {first}")
        if rest and rest not in shown:  # several conditions may quote the same log
            said(rest)
        shown |= {first, rest}
    if deployment.state == pb.Deployment.FAILED:
        said(f"What its replicas printed: ekiben deployments logs {name}")
