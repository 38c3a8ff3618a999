"""`ekiben secrets`: values that replicas and builds get."""

from collections.abc import Callable
from pathlib import Path

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import PAIR, F, confirm, limit_option, output_option, yes_option
from ekiben.cli.output import age, collect, last, moment, print_item, print_items, said
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.identity.v1 import identity_pb2 as pb

KINDS = {"env": pb.Secret.ENV, "file": pb.Secret.MOUNT_FILE}
STAGES = {"all": pb.Secret.ALL, "build": pb.Secret.BUILD, "runtime": pb.Secret.RUNTIME}


def _kind(secret: pb.Secret) -> str:
    return "file" if secret.kind == pb.Secret.MOUNT_FILE else "env"


def _stage(secret: pb.Secret) -> str:
    return next((word for word, value in STAGES.items() if value == secret.stage), "all")


COLUMNS = [
    ("SECRET", lambda s: last(s.name)),
    ("KIND", _kind),
    ("STAGE", _stage),
    ("KEYS", lambda s: " ".join(item.key for item in s.items)),
    ("AGE", lambda s: age(s.create_time)),
]


def fields(secret: pb.Secret) -> list[tuple[str, str]]:
    """What `get` prints; values are never returned."""
    return [
        ("Secret", last(secret.name)),
        ("Kind", _kind(secret)),
        ("Stage", _stage(secret)),
        ("Path", secret.path),
        ("Keys", "\n".join(item.key for item in secret.items)),
        ("Description", secret.description),
        ("Created", f"{moment(secret.create_time)} by {last(secret.creator)}"),
        ("Updated", moment(secret.update_time)),
    ]


def read_env_file(path: Path) -> list[tuple[str, str]]:
    """`KEY=VALUE` lines; blank lines and `#` comments are left out, `export` and quotes around values are taken off.

    Raises:
        click.UsageError: a line is something else.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip().removeprefix("export ").strip()
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise click.UsageError(f"{path}:{number}: not KEY=VALUE.")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found.append((key.strip(), value))
    return found


def _items(
    literals: tuple[tuple[str, str], ...], files: tuple[str, ...], env_files: tuple[Path, ...]
) -> list[pb.Secret.Item]:
    values = dict(literals)
    for env_file in env_files:
        values.update(read_env_file(env_file))
    for word in files:
        key, equals, name = word.partition("=")
        path = Path(name if equals else word)
        values[key if equals else path.name] = path.read_text(encoding="utf-8")
    return [pb.Secret.Item(key=key, value=value) for key, value in values.items()]


def _value_options(function: F) -> F:
    options: list[Callable[[F], F]] = [
        click.option("--literal", "literals", type=PAIR, multiple=True, metavar="KEY=VALUE", help="A value."),
        click.option("--from-file", "files", multiple=True, metavar="[KEY=]FILE", help="A file's text as a value."),
        click.option(
            "--from-env-file",
            "env_files",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            multiple=True,
            help="KEY=VALUE lines of a file.",
        ),
        click.option("--kind", type=click.Choice(list(KINDS)), help="Environment variables, or files below --path."),
        click.option("--stage", type=click.Choice(list(STAGES)), help="Where it is given: build, runtime, or all."),
        click.option("--path", help="Folder of the files, for --kind file."),
        click.option("--description", help="Free text."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group(cls=NounGroup)
def secrets() -> None:
    """Secrets: values that replicas and builds get. Values go in and are never shown."""


@secrets.command("list")
@click.option("--filter", "filter_", default="", help="Words of the name or the description.")
@limit_option
@output_option
@run
async def list_(client: Client, filter_: str, limit: int, output: str) -> None:
    """List secrets by name."""
    print_items(await collect(client.secrets.list(filter=filter_, limit=limit)), COLUMNS, output, empty="No secrets.")


@secrets.command()
@click.argument("secret")
@output_option
@run
async def get(client: Client, secret: str, output: str) -> None:
    """Show one SECRET, without its values."""
    found = await client.secrets.get(short.resource("secrets", secret))
    print_item(found, fields(found), output)


@secrets.command()
@click.argument("secret")
@_value_options
@output_option
@run
async def create(
    client: Client,
    secret: str,
    literals: tuple[tuple[str, str], ...],
    files: tuple[str, ...],
    env_files: tuple[Path, ...],
    kind: str | None,
    stage: str | None,
    path: str | None,
    description: str | None,
    output: str,
) -> None:
    """Create a SECRET.

    \b
    ekiben secrets create hub --literal HF_TOKEN=hf_abc
    ekiben secrets create config --kind file --path /etc/app --from-file app.json
    """
    items = _items(literals, files, env_files)
    if not items:
        raise click.UsageError("No values: give --literal, --from-file or --from-env-file.")
    wanted = pb.Secret(
        name=short.resource("secrets", secret),
        kind=KINDS[kind or "env"],
        stage=STAGES[stage or "all"],
        path=path or "",
        description=description or "",
        items=items,
    )
    made = await client.secrets.create(wanted)
    print_item(made, fields(made), output)


@secrets.command()
@click.argument("secret")
@_value_options
@output_option
@run
async def update(
    client: Client,
    secret: str,
    literals: tuple[tuple[str, str], ...],
    files: tuple[str, ...],
    env_files: tuple[Path, ...],
    kind: str | None,
    stage: str | None,
    path: str | None,
    description: str | None,
    output: str,
) -> None:
    """Change a SECRET. Values that are given replace all that it has."""
    wanted = pb.Secret(name=short.resource("secrets", secret))
    paths = []
    if items := _items(literals, files, env_files):
        wanted.items.extend(items)
        paths.append("items")
    if kind:
        wanted.kind = KINDS[kind]
        paths.append("kind")
    if stage:
        wanted.stage = STAGES[stage]
        paths.append("stage")
    if path is not None:
        wanted.path = path
        paths.append("path")
    if description is not None:
        wanted.description = description
        paths.append("description")
    if not paths:
        raise click.UsageError("Nothing to change: give values, --kind, --stage, --path or --description.")
    changed = await client.secrets.update(wanted, paths)
    print_item(changed, fields(changed), output)


@secrets.command()
@click.argument("secret")
@yes_option
@run
async def delete(client: Client, secret: str, yes: bool) -> None:
    """Delete a SECRET. Replicas that run keep what they were given."""
    name = short.resource("secrets", secret)
    confirm(f"Delete secret {last(name)}?", yes)
    await client.secrets.delete(name)
    said(f"Deleted secret {last(name)}.")
