"""Options that many commands share, and the types of their values. Only click is imported here."""

import re
import sys
from collections.abc import Callable, Container, Iterable, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class DurationType(click.ParamType):  # type: ignore[type-arg]
    """`90`, `90s`, `15m`, `2h30m`, `7d`: seconds as a float."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, int | float):
            return float(value)
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhdw]?)", value)
        if not parts or "".join(number + unit for number, unit in parts) != value:
            self.fail(f"{value!r} is not a duration. Write 90s, 15m, 2h or 7d.", param, ctx)
        return sum(float(number) * _UNITS[unit] for number, unit in parts)


class TimeType(click.ParamType):  # type: ignore[type-arg]
    """A time: `15m` (ago), `2026-01-31`, `2026-01-31T12:00:00Z`; without a zone it is local time."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """An aware time."""
        if isinstance(value, datetime):
            return value
        if re.fullmatch(r"(?:\d+(?:\.\d+)?[smhdw])+", value):
            return datetime.now(UTC) - timedelta(seconds=DURATION.convert(value, param, ctx))
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a time. Write 15m (ago), 2026-01-31 or 2026-01-31T12:00:00Z.", param, ctx)
        return time.astimezone(UTC)


class PairType(click.ParamType):  # type: ignore[type-arg]
    """`KEY=VALUE`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The two."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not KEY=VALUE.", param, ctx)
        return key, text


class KindType(click.Choice[str]):
    """`models` or `bentos`; the singular means the same."""

    name = "kind"

    def __init__(self) -> None:
        super().__init__(["models", "bentos"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The plural, whichever was written."""
        plural = f"{value}s"
        return super().convert(plural if plural in self.choices else value, param, ctx)


class ChangeType(click.ParamType):  # type: ignore[type-arg]
    """`KEY=VALUE`, or `KEY-`, which takes it away: what kubectl's users write."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | None]:
        """Key and value; None for none."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if key and equals:
            return key, text
        if (gone := taken_away(value)) is None:
            self.fail(f"{value!r} is neither KEY=VALUE nor KEY-, which takes KEY away.", param, ctx)
        return gone, None


class OrDefault(click.ParamType):  # type: ignore[type-arg]
    """What another type takes, or `default` to set it no more."""

    def __init__(self, inner: click.ParamType) -> None:  # type: ignore[type-arg]
        self.inner = inner
        self.name = f"{inner.name}|{DEFAULT}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`DEFAULT`, or what the other type makes of it."""
        return DEFAULT if value == DEFAULT else self.inner.convert(value, param, ctx)


DEFAULT = "default"
"""In place of a value: as if it had never been set."""
DURATION, TIME, PAIR, CHANGE, KIND = DurationType(), TimeType(), PairType(), ChangeType(), KindType()


def taken_away(word: str) -> str | None:
    """`KEY` of `KEY-`; None for anything else. No name, label or header ends so."""
    return word.removesuffix("-") if len(word) > 1 and word.endswith("-") and "=" not in word else None


def change(values: MutableMapping[str, str], changes: Iterable[tuple[str, str | None]]) -> None:
    """Set each key, or take it away where its value is None."""
    for key, value in changes:
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value


def connection_options(function: F) -> F:
    """`--endpoint`, `--token`, `--context`, `--debug`, `--trace`, for the root's help."""
    for option in reversed(_connection(hidden=False).values()):
        function = option(function)
    return function


def _connection(*, hidden: bool) -> dict[str, Callable[[Any], Any]]:
    return {
        "endpoint": click.option("--endpoint", metavar="URL", help="The server: http(s)://HOST:PORT.", hidden=hidden),
        "token": click.option("--token", metavar="TOKEN", help="API token to use.", hidden=hidden),
        "context": click.option("--context", metavar="NAME", help="A context of `ekiben login`.", hidden=hidden),
        "trace": click.option("--trace", is_flag=True, help="Print the trace id at the end.", hidden=hidden),
        "debug": click.option("--debug", is_flag=True, help="Print a traceback when something fails.", hidden=hidden),
    }


def hidden_connection_options(*, without: Container[str] = ()) -> Callable[[F], F]:
    """The same for each command, left out of its help: they work before and after the command's name.

    `without` are those names which the command uses for something of its own.
    """

    def decorate(function: F) -> F:
        for name, option in reversed(_connection(hidden=True).items()):
            if name not in without:
                function = option(function)
        return function

    return decorate


def output_option(function: F) -> F:
    """`-o table|json|yaml|name`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml", "name"], case_sensitive=False),
        default="table",
        help="How to print; json and yaml are what the HTTP API says.",
    )(function)


def table_or_json(help: str, *names: str) -> Callable[[F], F]:
    """`-o table|json`, where there is no more to choose from; `names` as `click.option` takes them."""
    return click.option(
        "-o", "--output", *names, type=click.Choice(["table", "json"], case_sensitive=False), default="table", help=help
    )


lines_option = table_or_json("json: one object a line.")
"""Of what comes one by one."""


def limit_option(function: F) -> F:
    """`--limit N`."""
    return click.option("--limit", type=click.IntRange(0), default=0, help="At most so many; 0 is all.")(function)


def yes_option(function: F) -> F:
    """`--yes`."""
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(function)


def resume_option(function: F) -> F:
    """`--resume`."""
    return click.option(
        "--resume", is_flag=True, help="Go on with a push of the same bytes that was interrupted, by whatever."
    )(function)


def label_option(function: F) -> F:
    """`--label KEY=VALUE`, repeatable."""
    return click.option(
        "-l", "--label", "labels", type=PAIR, multiple=True, metavar="KEY=VALUE", help="Set a label. Repeatable."
    )(function)


def confirm(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone, where somebody is there to answer; else go on.

    Raises:
        click.Abort: the answer was no.
    """
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        click.confirm(question, abort=True, err=True)
