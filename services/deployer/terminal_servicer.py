"""ekiben.deployer.v1.Terminals: parse, call a use case, format."""

import contextlib
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from google.protobuf.empty_pb2 import Empty

from ekiben.deployer.v1 import terminals_pb2 as pb
from ekiben.deployer.v1 import terminals_pb2_grpc as stubs
from ekiben.errors import InvalidArgument
from services.deployer.attachments import Exit, Input, Output, Started
from services.deployer.domain import Terminal
from services.deployer.messages import time
from services.deployer.terminals import LONGEST_INPUT, Terminals
from services.kernel import pages
from services.kernel.identity import current_principal

_LARGEST = 10_000


class TerminalsServicer(stubs.TerminalsServicer):
    """See the module."""

    def __init__(self, terminals: Terminals) -> None:
        self._terminals = terminals

    async def CreateTerminal(self, request: pb.CreateTerminalRequest, context: Any) -> pb.Terminal:
        """A terminal to attach to."""
        wanted = request.terminal
        made = await self._terminals.create(
            current_principal(),
            request.parent,
            replica=wanted.replica,
            service=wanted.service,
            command=list(wanted.command),
            tty=wanted.tty,
            image=wanted.debug_image,
        )
        return _formatted(made)

    async def AttachTerminal(
        self, requests: AsyncIterator[pb.TerminalInput], context: Any
    ) -> AsyncIterator[pb.TerminalOutput]:
        """What the command writes, while the caller types."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("input") != "attach":
            raise InvalidArgument(
                "The first message must name the terminal, in `attach`.",
                reason="FIELDS_INVALID",
                violations=[("attach", "must be the first message")],
            )
        size = _size(first.attach.size) if first.attach.HasField("size") else (0, 0)
        outputs = self._terminals.attach(current_principal(), first.attach.name, size, _inputs(requests))
        async with contextlib.aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                yield _output(output)

    async def GetTerminal(self, request: pb.GetTerminalRequest, context: Any) -> pb.Terminal:
        """One terminal."""
        return _formatted(await self._terminals.get(current_principal(), request.name))

    async def ListTerminals(self, request: pb.ListTerminalsRequest, context: Any) -> pb.ListTerminalsResponse:
        """A page of terminals."""
        size, after = pages.page_size(request.page_size), pages.decode(request, datetime, str)
        found = await self._terminals.list_(current_principal(), request.parent, after, size + 1)
        last = found[size - 1] if len(found) > size else None
        token = pages.encode(request, last.create_time, last.id) if last else ""
        return pb.ListTerminalsResponse(terminals=[_formatted(one) for one in found[:size]], next_page_token=token)

    async def ReadRecording(self, request: pb.ReadRecordingRequest, context: Any) -> AsyncIterator[pb.RecordingPiece]:
        """The recording."""
        async for text in self._terminals.read(current_principal(), request.name):
            yield pb.RecordingPiece(text=text)

    async def DeleteTerminal(self, request: pb.DeleteTerminalRequest, context: Any) -> Empty:
        """Nothing of it is left."""
        await self._terminals.delete(current_principal(), request.name)
        return Empty()


async def _inputs(requests: AsyncIterator[pb.TerminalInput]) -> AsyncIterator[Input]:
    async for request in requests:
        kind = request.WhichOneof("input")
        if kind == "data":
            if len(request.data) > LONGEST_INPUT:
                raise _invalid("data", f"must have at most {LONGEST_INPUT} bytes")
            yield Input(data=request.data)
        elif kind == "resize":
            yield Input(size=_size(request.resize))
        elif kind == "end_of_input":
            yield Input(end=True)
        else:
            raise _invalid("attach", "must be the first message, and no other")


def _size(of: pb.TerminalSize) -> tuple[int, int]:
    if not (1 <= of.columns <= _LARGEST and 1 <= of.rows <= _LARGEST):
        raise _invalid("size", f"must have from 1 to {_LARGEST} columns and rows")
    return of.columns, of.rows


def _invalid(field: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{field} {what}.", reason="FIELDS_INVALID", violations=[(field, what)])


def _output(of: Output) -> pb.TerminalOutput:
    if isinstance(of, Started):
        return pb.TerminalOutput(started=True)
    if isinstance(of, Exit):
        reason = pb.Terminal.EndReason.Value(of.reason)
        return pb.TerminalOutput(exit=pb.TerminalExit(exit_code=of.exit_code, reason=reason, message=of.message))
    return pb.TerminalOutput(stdout=of.data) if of.stdout else pb.TerminalOutput(stderr=of.data)


def _formatted(of: Terminal) -> pb.Terminal:
    return pb.Terminal(
        name=of.name,
        replica=of.replica,
        service=of.service,
        command=of.command,
        tty=of.tty,
        debug_image=of.debug_image,
        state=pb.Terminal.State.Value(of.state),
        end_reason=pb.Terminal.EndReason.Value(of.reason) if of.reason else pb.Terminal.END_REASON_UNSPECIFIED,
        exit_code=of.exit_code,
        creator=of.user,
        create_time=time(of.create_time),
        end_time=time(of.end_time) if of.end_time else None,
    )
