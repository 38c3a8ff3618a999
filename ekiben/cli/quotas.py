"""`ekiben quotas`: how much the organization may keep, and how much it does."""

import re
from typing import Any

import click

from ekiben.cli.groups import NounGroup
from ekiben.cli.options import output_option
from ekiben.cli.output import last, moment, print_item, size
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.quotas import OWN
from ekiben.registry.v1 import quotas_pb2 as pb

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_UNITS |= {f"{unit}iB": factor for unit, factor in _UNITS.items() if unit} | {"B": 1}


class Limit(click.ParamType):  # type: ignore[type-arg]
    """A number, with a unit where it counts bytes, or `none`."""

    name = "limit"

    def __init__(self, *, units: bool) -> None:
        self._units = _UNITS if units else {"": 1}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; -1 for none."""
        if isinstance(value, int):
            return value
        if value == "none":
            return -1
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value)
        if found is None or found[2] not in self._units or ("." in found[1] and len(self._units) == 1):
            example = "500GiB" if len(self._units) > 1 else "1000"
            self.fail(f"{value!r} is not a limit. Write {example}, say, or none.", param, ctx)
        return (
            int(float(found[1]) * self._units[found[2]]) if "." in found[1] else int(found[1]) * self._units[found[2]]
        )


def _of(used: int, quota: pb.Quota, field: str, show: Any = "{:,}".format) -> str:
    if not quota.HasField(field):  # type: ignore[arg-type]
        return f"{show(used)}, no limit"
    limit = getattr(quota, field)
    share = f" ({used / limit:.0%})" if limit else ""
    return f"{show(used)} of {show(limit)}{share}"


def fields(quota: pb.Quota) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Bytes", _of(quota.stored_bytes, quota, "max_stored_bytes", size)),
        ("Versions", _of(quota.version_count, quota, "max_versions")),
        ("Repositories", _of(quota.repository_count, quota, "max_repositories")),
        ("Limits set", f"{moment(quota.update_time)} by {last(quota.updater)}" if quota.updater else ""),
        ("Name", quota.name),
    ]


@click.group(cls=NounGroup)
def quotas() -> None:
    """Quotas: what the organization may keep in the registry, and what it keeps.

    Content counts once, however many models and bentos have it; what was deleted and can be restored counts as bytes.
    """


@quotas.command()
@output_option
@run
async def get(client: Client, output: str) -> None:
    """Show the limits and what is used of them."""
    found = await client.quotas.get()
    print_item(found, fields(found), output)


@quotas.command("set")
@click.option("--bytes", "max_stored_bytes", type=Limit(units=True), help="Of content: 500GiB, 2TiB, or none.")
@click.option("--versions", "max_versions", type=Limit(units=False), help="Models and bentos together, or none.")
@click.option("--repositories", "max_repositories", type=Limit(units=False), help="Of both kinds together, or none.")
@output_option
@run
async def set_(
    client: Client,
    max_stored_bytes: int | None,
    max_versions: int | None,
    max_repositories: int | None,
    output: str,
) -> None:
    """Set limits, or lift them with none. For admins.

    A limit below what is there deletes nothing; nothing more is taken then.

    \b
      ekiben quotas set --bytes 500GiB --versions 10000
      ekiben quotas set --bytes none
    """
    given = {
        "max_stored_bytes": max_stored_bytes,
        "max_versions": max_versions,
        "max_repositories": max_repositories,
    }
    paths = [name for name, value in given.items() if value is not None]
    if not paths:
        raise click.UsageError("Nothing to change: give --bytes, --versions or --repositories.")
    wanted = pb.Quota(name=OWN)
    for name in paths:
        if given[name] != -1:
            setattr(wanted, name, given[name])
    found = await client.quotas.update(wanted, paths)
    print_item(found, fields(found), output)
