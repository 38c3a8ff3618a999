"""A terminal while it is open: its command runs, and what it writes is recorded and passed on."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from ekiben.errors import EkibenError, ResourceExhausted, Unavailable
from services.deployer.domain import Terminal
from services.deployer.recordings import Recording
from services.deployer.runtimes import Runtime
from services.deployer.runtimes.sessions import STDOUT, ExecSpec, Session
from services.deployer.settings import Settings
from services.deployer.store import TerminalStore
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

_END_AGAIN_S, _END_SELDOM_S = 0.2, 10.0


@dataclass(frozen=True)
class Input:
    """One thing that the caller does: sends data, resizes, or says that no more comes."""

    data: bytes = b""
    size: tuple[int, int] | None = None
    end: bool = False


@dataclass(frozen=True)
class Started:
    """The command runs."""


@dataclass(frozen=True)
class Written:
    """What the command wrote."""

    stdout: bool
    data: bytes


@dataclass(frozen=True)
class Exit:
    """It ended."""

    exit_code: int
    reason: str
    message: str = ""


Output = Started | Written | Exit


class Attachment:
    """See the module."""

    def __init__(
        self, terminal: Terminal, store: TerminalStore, runtime: Runtime, settings: Settings, clock: Clock
    ) -> None:
        self._terminal, self._store, self._runtime = terminal, store, runtime
        self._settings, self._clock = settings, clock
        self._recording = Recording(store, terminal, settings.terminal_recording_max_bytes, clock)

    async def outputs(self, size: tuple[int, int], inputs: AsyncIterator[Input]) -> AsyncGenerator[Output, None]:
        """Run the command: its outputs, `Exit` last. Left before that, it is hung up.

        Raises:
            EkibenError: it cannot be started; what its runtime says.
        """
        outputs: asyncio.Queue[Output | BaseException] = asyncio.Queue(64)
        # A task of its own, as a time limit cannot reach over a `yield`; it ends with this iterator.
        running = asyncio.create_task(self._run(size, inputs, outputs))
        try:
            while True:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if isinstance(output, Exit):
                    return
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _run(
        self,
        size: tuple[int, int],
        inputs: AsyncIterator[Input],
        outputs: "asyncio.Queue[Output | BaseException]",
    ) -> None:
        exit = Exit(255, "CLIENT_LEFT")
        try:
            exit = await self._session(size, inputs, outputs)
        except asyncio.CancelledError:
            raise
        except EkibenError as exc:
            reason = "LOST" if isinstance(exc, Unavailable) else "FAILED"
            exit = Exit(255, reason, exc.message)
            if not self._recording.begun:
                await outputs.put(exc)
        except Exception:
            log.exception("a terminal ended by a fault", extra={"terminal": self._terminal.name})
            exit = Exit(255, "LOST", "A fault in the platform ended it.")
        finally:
            await asyncio.shield(self._close(exit))
        await outputs.put(exit)

    async def _close(self, exit: Exit) -> None:
        """Write how it ended. Never raises: the caller waits to hear it, and what is not written is swept as lost."""
        terminal, recording = self._terminal, self._recording
        code = exit.exit_code if exit.reason == "EXITED" else None
        recording.mark(exit.reason if code is None else f"{exit.reason} {code}")
        for writing in (recording.flush(), self._store.end(terminal.id, exit.reason, code, self._clock.now())):
            try:
                await writing
            except Exception:
                log.exception("the end of a terminal could not be written", extra={"terminal": terminal.name})
        log.info("terminal ended", extra={"terminal": terminal.name, "user": terminal.user, "reason": exit.reason})

    async def _session(
        self,
        size: tuple[int, int],
        inputs: AsyncIterator[Input],
        outputs: "asyncio.Queue[Output | BaseException]",
    ) -> Exit:
        terminal, recording = self._terminal, self._recording
        spec = ExecSpec(
            terminal.deployment_uid,
            terminal.replica,
            terminal.command,
            tty=terminal.tty,
            columns=size[0],
            rows=size[1],
            debug_image=terminal.debug_image,
            name=f"debug-{terminal.id}",
        )
        try:
            async with asyncio.timeout(self._settings.terminal_limit_s), self._runtime.exec(spec) as session:
                recording.begin(size)
                await recording.flush()  # Before anything is done there.
                await outputs.put(Started())
                async with asyncio.TaskGroup() as tasks:
                    helpers = [
                        tasks.create_task(_typed(inputs, session, recording, self._clock, tty=terminal.tty)),
                        tasks.create_task(recording.keep()),
                    ]
                    async for stream, data in session.output():
                        recording.output(data)
                        await outputs.put(Written(stream == STDOUT, data))
                    for helper in helpers:
                        helper.cancel()
        except TimeoutError:
            minutes = self._settings.terminal_limit_s / 60
            return Exit(255, "TIME_LIMIT", f"A terminal may be open for {minutes:g} minutes; open another one.")
        except BaseExceptionGroup as group:
            first = group.exceptions[0]
            if isinstance(first, ResourceExhausted):
                return Exit(255, "RECORDING_FULL", first.message)
            raise first from None
        except ResourceExhausted as exc:
            return Exit(255, "RECORDING_FULL", exc.message)
        if session.exit_code is None:
            return Exit(255, "LOST", "The way to the replica was lost.")
        return Exit(session.exit_code, "EXITED")


async def _typed(
    inputs: AsyncIterator[Input], session: Session, recording: Recording, clock: Clock, *, tty: bool
) -> None:
    """Pass on what the caller does. The end of a TTY's input is said until the command has ended: one Ctrl-D ends but
    the line that was begun, and whoever takes the TTY over meanwhile, as shells do, throws it away."""
    async for one in inputs:
        if one.size is not None:
            recording.resize(*one.size)
            await session.resize(*one.size)
        if one.data:
            if not tty:
                recording.input(one.data)
            await session.send(one.data)
        if one.end:
            break
    await session.end_input()
    wait_s = _END_AGAIN_S
    while tty:
        await clock.sleep(wait_s)
        await session.end_input()
        wait_s = min(2 * wait_s, _END_SELDOM_S)
