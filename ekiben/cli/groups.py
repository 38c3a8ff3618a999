"""How commands are found and how help is drawn."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

_SHORT = {"ls": "list", "rm": "delete", "describe": "get"}
"""Words that fingers know from elsewhere."""


@dataclass(frozen=True)
class Entry:
    """A command of the root: its name, its line of help, and the module below `ekiben.cli` that holds it."""

    name: str
    help: str
    module: str = ""

    def load(self) -> click.Command:
        """Import the module; the command is its attribute of the same name."""
        if self.name != "up":  # what becomes the servers keeps gRPC's own log lines
            # They would stand between ours. It reads this when whichever of a command's modules imports it first.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        module = import_module(f"ekiben.cli.{self.module or self.name}")
        command = getattr(module, self.name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


class Section:
    """Commands that belong together, under a heading."""

    def __init__(self, title: str, *entries: Entry) -> None:
        self.title, self.entries = title, entries


class NounGroup(click.Group):
    """A group of verbs, which also answers to short forms and names what was perhaps meant."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, by its name or a short form of it."""
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, _SHORT.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which is near."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean `{ctx.command_path} {near[0]}`?" if near else ""
            ctx.fail(f"There is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the module, which is the order of use."""
        return list(self.commands)


class RootGroup(NounGroup):
    """The root: commands in sections, loaded when called; singular forms work too."""

    def __init__(
        self, *args: Any, sections: Sequence[Section] = (), examples: Sequence[tuple[str, str]] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections, self.examples = sections, examples
        self._entries = {entry.name: entry for section in sections for entry in section.entries}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, by section."""
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command by its name, its singular, or its singular's irregular form."""
        plurals = (f"{cmd_name}s", f"{cmd_name}es", f"{cmd_name.removesuffix('y')}ies")
        entry = next((self._entries[name] for name in (cmd_name, *plurals) if name in self._entries), None)
        return entry.load() if entry else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; `help COMMAND…` is `COMMAND… --help`."""
        if args[:1] != ["help"]:
            return super().resolve_command(ctx, args)
        if len(args) == 1:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().resolve_command(ctx, [*args[1:], "--help"])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Draw the sections, then the examples."""
        width = max(map(len, self._entries))
        for section in self.sections:
            with formatter.section(section.title):
                formatter.write_dl([(entry.name.ljust(width), entry.help) for entry in section.entries])
        with formatter.section("Examples"):
            longest = max(len(command) for command, _ in self.examples)
            for command, says in self.examples:
                formatter.write(f"  {command.ljust(longest)}  {says}\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say where to read on."""
        formatter.write_paragraph()
        formatter.write("`ekiben COMMAND --help` says more; docs/cli.md says all.\n")
