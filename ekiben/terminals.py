"""Commands in replicas, run by hand, and the recordings of them."""

from collections.abc import AsyncIterator, Sequence

import grpc.aio

from ekiben import pages
from ekiben.deployer.v1 import terminals_pb2 as pb
from ekiben.deployer.v1.terminals_pb2_grpc import TerminalsStub


class Terminals:
    """Terminals into replicas."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = TerminalsStub(channel)

    async def create(
        self,
        deployment: str,
        command: Sequence[str] = (),
        *,
        replica: str = "",
        service: str = "",
        tty: bool = False,
        debug_image: str = "",
    ) -> pb.Terminal:
        """Ask for a command in a replica (a ready one of the entry service when none is named); `attach` runs it."""
        wanted = pb.Terminal(replica=replica, service=service, command=command, tty=tty, debug_image=debug_image)
        return await self._stub.CreateTerminal(pb.CreateTerminalRequest(parent=deployment, terminal=wanted))

    async def attach(
        self, name: str, inputs: AsyncIterator[pb.TerminalInput], *, size: tuple[int, int] | None = None
    ) -> AsyncIterator[pb.TerminalOutput]:
        """Run it: what it writes, and at last how it ended. Left before that, it is hung up.

        `inputs` is what is typed; at its end the command is told that no more comes.
        """

        async def requests() -> AsyncIterator[pb.TerminalInput]:
            first = pb.AttachTerminal(name=name)
            if size:
                first.size.columns, first.size.rows = size
            yield pb.TerminalInput(attach=first)
            async for one in inputs:
                yield one

        call = self._stub.AttachTerminal(requests())
        try:
            async for output in call:
                yield output
        finally:
            call.cancel()

    async def run(
        self,
        deployment: str,
        command: Sequence[str],
        *,
        replica: str = "",
        service: str = "",
        input: bytes = b"",
        debug_image: str = "",
    ) -> tuple[int, bytes, bytes]:
        """Run a command to its end: its exit status (255 where it did not end by itself), stdout and stderr."""
        terminal = await self.create(deployment, command, replica=replica, service=service, debug_image=debug_image)

        async def inputs() -> AsyncIterator[pb.TerminalInput]:
            for start in range(0, len(input), 32 << 10):
                yield pb.TerminalInput(data=input[start : start + (32 << 10)])
            yield pb.TerminalInput(end_of_input=True)

        code, stdout, stderr = 255, bytearray(), bytearray()
        async for output in self.attach(terminal.name, inputs()):
            stdout += output.stdout
            stderr += output.stderr
            if output.WhichOneof("output") == "exit":
                code = output.exit.exit_code
        return code, bytes(stdout), bytes(stderr)

    async def get(self, name: str) -> pb.Terminal:
        """One terminal."""
        return await self._stub.GetTerminal(pb.GetTerminalRequest(name=name))

    def list(self, deployment: str, *, limit: int = 0) -> AsyncIterator[pb.Terminal]:
        """The terminals of a deployment, newest first: one's own, or for an administrator all."""
        request = pb.ListTerminalsRequest(parent=deployment)
        return pages.items(self._stub.ListTerminals, request, "terminals", limit=limit)

    async def recording(self, name: str) -> AsyncIterator[str]:
        """What was seen in it as an asciicast, version 2, in pieces of whole lines."""
        async for piece in self._stub.ReadRecording(pb.ReadRecordingRequest(name=name)):
            yield piece.text

    async def delete(self, name: str) -> None:
        """Delete one that has ended, with its recording."""
        await self._stub.DeleteTerminal(pb.DeleteTerminalRequest(name=name))
