"""`ekiben builds`: from a bento to what can run."""

import asyncio

import click

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.cli import builder_caches, short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import DURATION, limit_option, output_option
from ekiben.cli.output import age, collect, last, moment, nanoseconds, print_item, print_items, said, size, tag
from ekiben.cli.progress import Steps
from ekiben.cli.session import run
from ekiben.client import Client

LOG_LINES_ON_FAILURE = 40
"""The end of a failed build's log that is printed: what the resolver or the installer said is in it."""


def state(build: pb.Build) -> str:
    """The state's name."""
    return pb.Build.State.Name(build.state)


def took(build: pb.Build) -> str:
    """How long it ran, once it has ended."""
    if not build.end_time.seconds or not build.start_time.seconds:
        return ""
    return nanoseconds(build.end_time.ToNanoseconds() - build.start_time.ToNanoseconds())


COLUMNS = [
    ("BUILD", lambda b: last(b.name)),
    ("BENTO", lambda b: tag(b.bento)),
    ("STATE", state),
    ("STEP", lambda b: b.step),
    ("CACHED", lambda b: "yes" if b.cached else ""),
    ("IMAGE", lambda b: last(b.image)),
    ("TOOK", took),
    ("AGE", lambda b: age(b.create_time)),
]


def fields(build: pb.Build) -> list[tuple[str, str]]:
    """What `get` prints."""
    environment = build.environment
    return [
        ("Build", last(build.name)),
        ("Bento", tag(build.bento)),
        ("State", state(build)),
        ("Step", f"{build.step} ({build.progress_percent} %)" if build.step else ""),
        ("Failure", build.failure.message),
        ("Cached", "yes" if build.cached else ""),
        ("Python", environment.python_version),
        ("BentoML", environment.bentoml_version),
        ("Packages", str(environment.package_count or "")),
        ("Size", size(environment.size_bytes) if environment.size_bytes else ""),
        ("Environment", environment.digest),
        ("Path", environment.path),
        ("Image", last(build.image)),
        ("Platforms", ", ".join(build.platforms)),
        ("Priority", "" if build.priority == pb.Build.NORMAL else pb.Build.Priority.Name(build.priority).lower()),
        ("Created", f"{moment(build.create_time)} by {last(build.creator)}"),
        ("Took", took(build)),
    ]


@click.group(cls=NounGroup)
def builds() -> None:
    """Builds: the Python environment in which a bento runs, made once and shared, and images of bentos."""


@builds.command("list")
@click.option("--bento", default="", help="Only builds of this bento.")
@limit_option
@output_option
@run
async def list_(client: Client, bento: str, limit: int, output: str) -> None:
    """List builds, newest first."""
    found = await collect(client.builds.list(bento=short.bento(bento) if bento else "", limit=limit))
    print_items(found, COLUMNS, output, empty="No builds yet.")


@builds.command()
@click.argument("build")
@output_option
@run
async def get(client: Client, build: str, output: str) -> None:
    """Show one BUILD."""
    found = await client.builds.get(short.resource("builds", build))
    print_item(found, fields(found), output)


@builds.command()
@click.argument("bento")
@click.option("--image", is_flag=True, help="Make an OCI image of it too.")
@click.option("--models-apart", is_flag=True, help="Make an OCI image without its models, and one of each model.")
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    metavar="OS/ARCH",
    help="What the image runs on. Repeatable.  [needs --image or --models-apart]",
)
@click.option("--force", is_flag=True, help="Build anew even where there is a good build.")
@click.option("--secret", "secrets", multiple=True, metavar="SECRET", help="Give it to the build. Repeatable.")
@click.option(
    "--priority",
    type=click.Choice(["batch", "normal", "interactive"]),
    default="normal",
    show_default=True,
    help="Its place in the queue.",
)
@click.option("-f", "--follow", "log", is_flag=True, help="Print its log while it runs.")
@click.option("--wait/--no-wait", default=True, help="Follow it to its end.")
@click.option("--timeout", type=DURATION, default="30m", show_default=True, help="How long to follow.")
@output_option
@run
async def create(
    client: Client,
    bento: str,
    image: bool,
    models_apart: bool,
    platforms: tuple[str, ...],
    force: bool,
    secrets: tuple[str, ...],
    priority: str,
    log: bool,
    wait: bool,
    timeout: float,
    output: str,
) -> int:
    """Build a BENTO, and follow it to its end.

    \b
    Examples:
      ekiben builds create summarizer
      ekiben builds create summarizer:production --image --follow
    """
    named = [short.resource("secrets", secret) for secret in secrets]
    resolved = (await client.bentos.get(short.bento(bento))).name
    build = await client.builds.create(
        resolved,
        force=force,
        secrets=named,
        image=image,
        models_apart=models_apart,
        platforms=platforms,
        priority=pb.Build.Priority.Value(priority.upper()),
    )
    return await ended(client, build, log=log, wait=wait, timeout_s=timeout, output=output)


@builds.command()
@click.argument("build")
@click.option("-f", "--follow", "log", is_flag=True, help="Print its log while it runs.")
@click.option("--wait/--no-wait", default=True, help="Follow it to its end.")
@click.option("--timeout", type=DURATION, default="30m", show_default=True, help="How long to follow.")
@output_option
@run
async def retry(client: Client, build: str, log: bool, wait: bool, timeout: float, output: str) -> int:
    """Build again what a BUILD that failed or was cancelled should have made."""
    again = await client.builds.retry(short.resource("builds", build))
    return await ended(client, again, log=log, wait=wait, timeout_s=timeout, output=output)


@builds.command("watch")
@click.argument("build")
@click.option("--timeout", type=DURATION, default="30m", show_default=True, help="How long to follow.")
@output_option
@run
async def watch(client: Client, build: str, timeout: float, output: str) -> int:
    """Follow a BUILD to its end. Exit code 1 where it failed."""
    found = await follow(client, short.resource("builds", build), timeout)
    print_item(found, fields(found), output)
    return 0 if found.state == pb.Build.SUCCEEDED else 1


@builds.command()
@click.argument("build")
@click.option("-f", "--follow", "follow_", is_flag=True, help="Go on to its end.")
@click.option("--tail", type=click.IntRange(0), default=0, help="Only the last so many lines; 0 is all.")
@run
async def logs(client: Client, build: str, follow_: bool, tail: int) -> None:
    """Print the log of a BUILD."""
    async for line in client.builds.log(short.resource("builds", build), follow=follow_, tail_lines=tail):
        click.echo(line.text)


@builds.command()
@click.argument("build")
@output_option
@run
async def cancel(client: Client, build: str, output: str) -> None:
    """Stop a BUILD."""
    found = await client.builds.cancel(short.resource("builds", build))
    said(f"Cancelled build {last(found.name)}.")
    if output != "table":
        print_item(found, fields(found), output)


async def ended(client: Client, build: pb.Build, *, log: bool, wait: bool, timeout_s: float, output: str) -> int:
    """Follow a build that was asked for as the options say, print it, and give the exit code."""
    if wait:
        build = await (tail if log else follow)(client, build.name, timeout_s)
    print_item(build, fields(build), output)
    return 1 if build.state in (pb.Build.FAILED, pb.Build.CANCELLED) else 0


async def tail(client: Client, name: str, timeout_s: float) -> pb.Build:
    """Print a build's log to its end, and give the build as it ended."""
    async with asyncio.timeout(timeout_s):
        async for line in client.builds.log(name, follow=True):
            said(line.text)
    return await client.builds.get(name)


async def follow(client: Client, name: str, timeout_s: float) -> pb.Build:
    """Follow a build to its end, showing its steps; a failed one's last lines are printed."""
    build = pb.Build(name=name)
    with Steps() as steps:
        async for build in client.builds.follow(name, timeout_s=timeout_s):
            steps.now(describe(build))
        if build.state == pb.Build.SUCCEEDED:
            steps.done(f"Built {tag(build.bento)}" + (" (cached)" if build.cached else f" in {took(build)}"))
    if build.state == pb.Build.FAILED:
        await print_failure(client, build)
    return build


def describe(build: pb.Build) -> str:
    """What a build is doing, as a line."""
    doing = build.step or state(build).lower()
    return f"Building {tag(build.bento)}: {doing}" + (
        f" ({build.progress_percent} %)" if build.progress_percent else ""
    )


async def print_failure(client: Client, build: pb.Build) -> None:
    """Print why a build failed: the end of its log, then the reason."""
    async for line in client.builds.log(build.name, tail_lines=LOG_LINES_ON_FAILURE):
        said(f"  {line.text}")
    said(click.style("Build failed: ", fg="red", bold=True) + build.failure.message)
    said(f"The whole log: ekiben builds logs {last(build.name)}")


builds.add_command(builder_caches.stats)
builds.add_command(builder_caches.gc)
