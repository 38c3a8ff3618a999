"""The body of a request as a source of bytes; a large one past aiohttp, from the socket into the store's own buffers.

aiohttp makes an object of each 256 KiB that come, and takes it through its parser and a queue in the event loop. For a
model that is as much work as hashing it.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from services.content.blobs.source import Chunks, Source

DIRECT_BYTES = 4 << 20
"""From this size on a connection is given up for a body: it cannot carry another request after that."""
USED_UP = web.RequestKey("used_up", bool)
"""Key of a request whose connection must be closed after the answer."""
_MOST_DIRECT = 16
"""Each has a thread, which a client that sends slowly keeps waiting; what comes beyond goes through aiohttp."""


class Bodies:
    """Gives bodies, and counts those that go past aiohttp."""

    def __init__(self) -> None:
        self._direct = 0

    @contextlib.asynccontextmanager
    async def of(self, request: web.Request, size_bytes: int) -> AsyncIterator[Source]:
        """The body, of `size_bytes` bytes by its Content-Length, as a source while inside.

        One that breaks off raises ConnectionError or aiohttp's error, or cancels the handler. The answer to a request
        that has USED_UP must close the connection.
        """
        transport = request.transport
        end = None if transport is None else transport.get_extra_info("socket")
        if size_bytes < DIRECT_BYTES or transport is None or end is None or self._direct >= _MOST_DIRECT:
            yield Chunks(_chunks(request))
            return
        self._direct += 1
        request[USED_UP] = True
        try:
            # What is here already has passed the parser; it is at most what aiohttp buffers.
            first = bytearray()
            while chunk := request.content.read_nowait():
                first += chunk
            transport.pause_reading()
            with ThreadPoolExecutor(1, "body") as thread, socket.socket(fileno=os.dup(end.fileno())) as own:
                body = _Direct(own, thread, memoryview(first), size_bytes)
                own.setblocking(True)  # The other descriptor too: it is one socket.
                try:
                    yield body
                finally:
                    own.setblocking(False)
            if not body.left:
                # For aiohttp, which would wait for the rest.
                request.content.feed_eof()
        finally:
            self._direct -= 1
            # To hear of its end.
            transport.resume_reading()


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    # Chunk by chunk: `readany` would first copy what has gathered into one. Not `iter_chunks`, which never ends for the
    # empty body, of which aiohttp has one for all requests.
    while chunk := (await request.content.readchunk())[0]:
        yield chunk


class _Direct:
    """Reads a socket in a thread: one call of the system for each buffer."""

    def __init__(self, end: socket.socket, thread: ThreadPoolExecutor, first: memoryview, size_bytes: int) -> None:
        self._end = end
        self._thread = thread
        self._first = first
        self.left = size_bytes
        """How many bytes are still to be read."""

    async def readinto(self, buffer: memoryview) -> int:
        """See Source. Raises ConnectionResetError where the client went away."""
        wanted = min(len(buffer), self.left)
        if taken := min(len(self._first), wanted):
            buffer[:taken] = self._first[:taken]
            self._first = self._first[taken:]
        if taken < wanted:
            reading = asyncio.get_running_loop().run_in_executor(self._thread, self._fill, buffer[taken:wanted])
            try:
                await asyncio.shield(reading)
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):
                    self._end.shutdown(socket.SHUT_RD)
                await asyncio.wait([reading])
                reading.exception()
                raise
        self.left -= wanted
        return wanted

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            got = self._end.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
            if not got:
                raise ConnectionResetError("The connection ended in the body of a request.")
            buffer = buffer[got:]
