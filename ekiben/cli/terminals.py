"""`ekiben deployments exec`, `debug` and `recordings`: commands in replicas, run by hand."""

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
import termios
import tty as raw
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import F, confirm, limit_option, output_option, yes_option
from ekiben.cli.output import age, collect, last, moment, print_items, said, visible
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.deployer.v1 import terminals_pb2 as pb

_PIECE = 32 << 10
_FEW, _MANY = 4, 16
"""Pieces of input that wait to be sent: with fewer more is read, with more nothing."""
_LONGEST_PAUSE_S = 2.0
"""A replay waits no longer, however long nothing happened."""


def _as_text(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words, which the API takes as text."""
    if any("\udc80" <= char <= "\udcff" for word in words for char in word):
        raise click.BadParameter("it has bytes that are no UTF-8; pass them by standard input, with -i.")
    return words


def _named(context: click.Context, parameter: click.Parameter, image: str) -> str:
    if not image.strip():
        raise click.BadParameter("name an image; `ekiben deployments exec` needs none.")
    return image


def _where(function: F) -> F:
    """Which replica, and how."""
    for option in (
        click.option("-t", "--tty", is_flag=True, help="Give it a terminal: line editing, colours, whole screens."),
        click.option("-i", "--stdin", is_flag=True, help="Pass on what is typed or piped."),
        click.option("--service", default="", help="A replica of this service; the entry service when left out."),
        click.option("-r", "--replica", default="", help="This replica; a ready one when left out."),
    ):
        function = option(function)
    return function


@click.command("exec")
@click.argument("deployment")
@click.argument("command", nargs=-1, callback=_as_text)
@_where
@run
async def exec_(
    client: Client,
    deployment: str,
    command: tuple[str, ...],
    replica: str,
    service: str,
    stdin: bool,
    tty: bool,
) -> int:
    """Run a COMMAND in a replica of a DEPLOYMENT, or a shell. It is recorded; its exit status is this command's.

    \b
    ekiben deployments exec demo
    ekiben deployments exec demo -- env
    ekiben deployments exec demo -it --service Scorer -- python
    """
    return await _exec(client, deployment, command, replica, service, stdin, tty, "")


@click.command()
@click.argument("deployment")
@click.argument("command", nargs=-1, callback=_as_text)
@click.option(
    "--image",
    required=True,
    callback=_named,
    help="What the container is made of; it must run as another user than root.",
)
@_where
@run
async def debug(
    client: Client,
    deployment: str,
    command: tuple[str, ...],
    image: str,
    replica: str,
    service: str,
    stdin: bool,
    tty: bool,
) -> int:
    """Put a container of another image beside a replica of a DEPLOYMENT on Kubernetes, and run a COMMAND in it.

    It sees the replica's processes and network. It stays in the pod, once ended, until that goes.

    \b
    ekiben deployments debug demo --image registry.example.com/tools:1
    """
    return await _exec(client, deployment, command, replica, service, stdin, tty, image)


async def _exec(
    client: Client,
    deployment: str,
    command: tuple[str, ...],
    replica: str,
    service: str,
    stdin: bool,
    tty: bool,
    image: str,
) -> int:
    if not command and sys.stdin.isatty() and sys.stdout.isatty():
        stdin = tty = True
    name = short.resource("deployments", deployment)
    terminal = await client.terminals.create(
        name, command, replica=replica, service=service, tty=tty, debug_image=image
    )
    code = 255
    with _Keyboard(stdin=stdin, tty=tty) as keyboard:
        async for output in client.terminals.attach(terminal.name, keyboard.inputs(), size=keyboard.size()):
            _show(output)
            if output.WhichOneof("output") == "exit":
                code = output.exit.exit_code
                if output.exit.message:
                    said(f"\r{output.exit.message}\r")
    return code


def _show(output: pb.TerminalOutput) -> None:
    for stream, data in ((sys.stdout, output.stdout), (sys.stderr, output.stderr)):
        if data:
            stream.buffer.write(data)
            stream.buffer.flush()


class _Keyboard:
    """What is typed or piped while inside: key by key where there is a TTY. Reads no faster than it is sent."""

    def __init__(self, *, stdin: bool, tty: bool) -> None:
        self._keys, self._stdin, self._tty = sys.stdin.fileno(), stdin, tty
        self._before = termios.tcgetattr(self._keys) if tty and sys.stdin.isatty() else None
        self._inputs: asyncio.Queue[pb.TerminalInput] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._reading = False

    def __enter__(self) -> Self:
        if self._before is not None:
            raw.setraw(self._keys, termios.TCSADRAIN)  # What was typed before is not lost.
            self._loop.add_signal_handler(signal.SIGWINCH, self._resized)
        if self._stdin:
            self._read_on()
        else:
            self._inputs.put_nowait(pb.TerminalInput(end_of_input=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pause()
        if self._before is not None:
            self._loop.remove_signal_handler(signal.SIGWINCH)
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._before)

    async def inputs(self) -> AsyncIterator[pb.TerminalInput]:
        """What comes, until nobody asks any more: the end of the stream is not that of the input."""
        while True:
            one = await self._inputs.get()
            yield one
            if self._stdin and not self._reading and not one.end_of_input and self._inputs.qsize() < _FEW:
                self._read_on()

    def size(self) -> tuple[int, int] | None:
        """Of the window, where the command has one."""
        if not self._tty:
            return None
        try:
            found = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            return 80, 24
        return max(1, found.columns), max(1, found.lines)

    def _read_on(self) -> None:
        self._reading = True
        try:
            self._loop.add_reader(self._keys, self._readable)
        except PermissionError:  # A file: it is always readable.
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        if not self._reading:
            return
        data = os.read(self._keys, _PIECE)
        self._inputs.put_nowait(pb.TerminalInput(data=data) if data else pb.TerminalInput(end_of_input=True))
        if not data:
            self._stdin = False
        if not data or self._inputs.qsize() > _MANY:
            self._pause()
        elif stat.S_ISREG(os.fstat(self._keys).st_mode):
            self._loop.call_soon(self._readable)

    def _pause(self) -> None:
        self._reading = False
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self._keys)

    def _resized(self) -> None:
        if size := self.size():
            self._inputs.put_nowait(pb.TerminalInput(resize=pb.TerminalSize(columns=size[0], rows=size[1])))


@click.group(cls=NounGroup)
def recordings() -> None:
    """What was done in terminals: list, show, replay, delete."""


@recordings.command("list")
@click.argument("deployment")
@limit_option
@output_option
@run
async def list_(client: Client, deployment: str, limit: int, output: str) -> None:
    """List the terminals of a DEPLOYMENT, newest first: yours, or for an administrator all."""
    columns = [
        ("RECORDING", lambda t: last(t.name)),
        ("STATE", lambda t: pb.Terminal.State.Name(t.state)),
        ("USER", lambda t: last(t.creator)),
        ("REPLICA", lambda t: t.replica),
        ("COMMAND", lambda t: visible(" ".join(t.command)) or "(shell)"),
        ("ENDED", _ended),
        ("AGE", lambda t: age(t.create_time)),
    ]
    found = await collect(client.terminals.list(short.resource("deployments", deployment), limit=limit))
    print_items(found, columns, output, empty="Nobody opened a terminal there.")


def _ended(terminal: pb.Terminal) -> str:
    if terminal.HasField("exit_code"):
        return f"exit {terminal.exit_code}"
    reason = pb.Terminal.EndReason.Name(terminal.end_reason)
    return reason if terminal.end_reason else ""


@recordings.command()
@click.argument("deployment")
@click.argument("recording")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Into a file, for `asciinema play`.")
@run
async def show(client: Client, deployment: str, recording: str, output: Path | None) -> None:
    """Print a RECORDING as an asciicast, or keep it in a file."""
    pieces = [piece async for piece in client.terminals.recording(_name(deployment, recording))]
    if output is None:
        click.echo("".join(pieces), nl=False)
    else:
        output.write_text("".join(pieces))
        said(f"Written to {output}.")


@recordings.command()
@click.argument("deployment")
@click.argument("recording")
@click.option("--speed", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="So many times as fast.")
@run
async def replay(client: Client, deployment: str, recording: str, speed: float) -> None:
    """Play a RECORDING on this terminal; in a pipe, print what was shown without pauses."""
    before = 0.0
    async for piece in client.terminals.recording(_name(deployment, recording)):
        for line in piece.splitlines():
            event = json.loads(line)
            if isinstance(event, dict):
                begun = pb.Terminal()
                begun.create_time.FromSeconds(int(event["timestamp"]))
                said(f"{event['title']}: {visible(event['command']) or '(shell)'}, {moment(begun.create_time)}")
                continue
            at, kind, text = event
            if kind == "o":
                if sys.stdout.isatty():
                    await asyncio.sleep(min(_LONGEST_PAUSE_S, (at - before) / speed))
                click.echo(text, nl=False)
            elif kind == "m":
                said(f"\n{text}")
            before = at


@recordings.command()
@click.argument("deployment")
@click.argument("recording")
@yes_option
@run
async def delete(client: Client, deployment: str, recording: str, yes: bool) -> None:
    """Delete a RECORDING. Only administrators may."""
    confirm(f"Delete what was recorded in {recording}?", yes)
    await client.terminals.delete(_name(deployment, recording))
    said(f"Deleted recording {recording}.")


def _name(deployment: str, recording: str) -> str:
    return f"{short.resource('deployments', deployment)}/terminals/{last(recording)}"
