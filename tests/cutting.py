"""A TCP proxy that cuts connections after so many bytes, wherever those fall."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Opener = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Cutting:
    """The proxy. It passes everything on while both limits are None."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self.url = ""
        self.up_limit: int | None = None
        """Bytes to the server after which each connection is cut."""
        self.down_limit: int | None = None
        """Bytes from the server after which each connection is cut."""
        self.most_connections: int | None = None
        """Connections after which each is refused."""
        self.hold_at: int | None = None
        """Bytes either way, all connections together, after which nothing passes any more, and `held` is set."""
        self.held = asyncio.Event()
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.up_bytes = 0
        self.down_bytes = 0
        self.connections = 0

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End every connection."""
        self._ended.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.most_connections is not None and self.connections >= self.most_connections:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            server_reader, server_writer = await self._opener()
        except OSError:
            writer.transport.abort()
            return
        up = asyncio.ensure_future(self._pass(reader, server_writer, "up"))
        down = asyncio.ensure_future(self._pass(server_reader, writer, "down"))
        try:
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.wait([up, down])
            for end in (writer, server_writer):
                with contextlib.suppress(OSError, RuntimeError):
                    end.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        passed = 0
        limit = self.up_limit if way == "up" else self.down_limit
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if limit is not None:
                    data = data[: limit - passed]
                passed += len(data)
                setattr(self, f"{way}_bytes", getattr(self, f"{way}_bytes") + len(data))
                if self.hold_at is not None and self.up_bytes + self.down_bytes >= self.hold_at:
                    self.held.set()
                    await self._ended.wait()
                writer.write(data)
                await writer.drain()
                if passed == limit:
                    return


@asynccontextmanager
async def cutting(opener: Opener) -> AsyncIterator[Cutting]:
    """Serve on a free port of loopback until the end of the block."""
    proxy = Cutting(opener)
    server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
