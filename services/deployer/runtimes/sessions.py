"""A command that somebody runs in a replica by hand: what it is asked for with, and what the port gives of it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

STDOUT, STDERR = 1, 2

SHELL = ("sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash || exec sh")
"""What is run where no command is named: the best shell of the image."""


@dataclass(frozen=True)
class ExecSpec:
    """A command, and where it runs."""

    deployment_uid: str
    replica: str
    command: tuple[str, ...]
    """Empty for SHELL, or for a debug image's own command."""
    tty: bool = False
    columns: int = 0
    rows: int = 0
    debug_image: str = ""
    """Run it in a container of this image beside the replica's own."""
    name: str = ""
    """Of that container: unique in the replica."""


class Session(Protocol):
    """A command that runs."""

    exit_code: int | None
    """Once `output` has ended; None where the way to it was lost before."""

    async def send(self, data: bytes) -> None:
        """Bytes for its standard input; what comes after its end is dropped."""
        ...

    async def end_input(self) -> None:
        """No more of them come."""
        ...

    async def resize(self, columns: int, rows: int) -> None:
        """Its TTY has another size."""
        ...

    def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """What it writes, with STDOUT or STDERR; ends when it ends."""
        ...
