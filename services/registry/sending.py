"""A blob as an answer: a file from the page cache by sendfile, or from the disk past it while nobody else asks for it.

Content is written past the page cache, and read once as a rule: by whoever deploys it. Filling the cache for that costs
more than the hash of the same bytes on a machine whose memory is not warm, and drives out what is read often. A blob
that is no file comes from its store as it is read there.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from ekiben.errors import EkibenError
from services.content.blobs import Blob, BlobReader
from services.content.blobs.sink import BLOCK_BYTES, DIRECT_BYTES, open_direct

log = logging.getLogger(__name__)

_BATCH_BYTES = 2 << 20
_MOST_DIRECT = 16
"""Each has two threads, of which a client that reads slowly keeps one waiting; what comes beyond goes by sendfile."""
_REMEMBERED = 1000


class Sender:
    """Makes answers, and remembers what was asked for of late: what is asked for again goes through the cache."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Path, None] = OrderedDict()
        self._placed = 0

    def response(self, path: Path, headers: dict[str, str]) -> web.FileResponse:
        """The answer that sends this file."""
        again = path in self._seen
        self._seen[path] = None
        self._seen.move_to_end(path)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return _Response(path, headers=headers, chunk_size=1 << 20, sender=None if again else self)

    @contextlib.contextmanager
    def place(self) -> Iterator[bool]:
        """Whether there is room for one more past the cache, while inside."""
        if self._placed >= _MOST_DIRECT:
            yield False
            return
        self._placed += 1
        try:
            yield True
        finally:
            self._placed -= 1


class _Response(web.FileResponse):
    """Ranges and conditions are aiohttp's; only the sending is not."""

    def __init__(self, path: Path, *, sender: Sender | None, **options: Any) -> None:
        super().__init__(path, **options)
        self._sender = sender

    async def _sendfile(self, request: web.BaseRequest, fobj: IO[Any], offset: int, count: int) -> AbstractStreamWriter:
        # Private to aiohttp: if it calls this no longer, everything goes by sendfile.
        if self._sender is None or count < DIRECT_BYTES or _is_cached(fobj.fileno(), offset + count // 2):
            return await super()._sendfile(request, fobj, offset, count)
        fd = open_direct(Path(f"/proc/self/fd/{fobj.fileno()}"), os.O_RDONLY)
        if fd < 0:
            return await super()._sendfile(request, fobj, offset, count)
        try:
            with self._sender.place() as free:
                if not free:
                    return await super()._sendfile(request, fobj, offset, count)
                writer = await web.StreamResponse.prepare(self, request)
                assert writer is not None
                transport = request.transport
                if transport is None:
                    raise ConnectionResetError("Connection lost")
                if transport.get_write_buffer_size():
                    return await self._sendfile_fallback(writer, fobj, offset, count)
                await _send(transport, fd, offset, count)
                await web.StreamResponse.write_eof(self)
                return writer
        finally:
            os.close(fd)


def _is_cached(fd: int, offset: int) -> bool:
    """Whether what lies at `offset` is in the page cache: read it only if it is.

    Ask for the middle: at its ends an archive was read when it was checked.
    """
    try:
        return bool(os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT))
    except (OSError, AttributeError):
        return False


async def _send(transport: asyncio.Transport, fd: int, offset: int, count: int) -> None:
    """From the disk to the socket, one batch read while the one before is sent, each in a thread."""
    loop = asyncio.get_running_loop()
    batches = [memoryview(mmap.mmap(-1, _BATCH_BYTES)) for _ in range(2)]
    skip = offset % BLOCK_BYTES
    at, left = offset - skip, count + skip

    def read(batch: memoryview, at: int) -> int:
        return os.preadv(fd, [batch], at)

    # Else the loop would read from a socket that blocks.
    transport.pause_reading()
    end = transport.get_extra_info("socket")
    with ThreadPoolExecutor(2, "send") as threads, socket.socket(fileno=os.dup(end.fileno())) as own:
        own.setblocking(True)
        try:
            reading = loop.run_in_executor(threads, read, batches[0], at)
            while left > 0:
                got = min(await asyncio.shield(reading), left)
                if got <= skip:
                    raise ConnectionAbortedError("The file ended before its size.")
                batch = batches[0][skip:got]
                at, left, skip = at + got, left - got, 0
                batches.reverse()
                if left > 0:
                    reading = loop.run_in_executor(threads, read, batches[0], at)
                await asyncio.shield(loop.run_in_executor(threads, own.sendall, batch))
        except BaseException:
            # Half an answer: also wakes the thread that waits for the client.
            with contextlib.suppress(OSError):
                own.shutdown(socket.SHUT_RDWR)
            transport.abort()
            raise
        finally:
            own.setblocking(False)
    transport.resume_reading()


async def send_blob(
    request: web.Request, blobs: BlobReader, blob: Blob, headers: dict[str, str], count: Callable[[int], None]
) -> web.StreamResponse:
    """Answer with a blob that is no file, or with the range that is asked for. `count` is told what passes."""
    try:
        asked = request.http_range
    except ValueError:
        asked = slice(blob.size_bytes, None)
    start, stop, _ = asked.indices(blob.size_bytes)
    partial = asked.start is not None or asked.stop is not None
    headers = headers | {"Accept-Ranges": "bytes", "ETag": f'"{blob.digest.hex}"'}
    if partial and start >= stop:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{blob.size_bytes}"})
    if partial:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size_bytes}"
    response = web.StreamResponse(status=206 if partial else 200, headers=headers)
    response.content_length = stop - start
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    try:
        async for chunk in blobs.read(blob.digest, offset=start, size_bytes=stop - start):
            await response.write(chunk)
            count(len(chunk))
    except EkibenError as exc:
        # Half an answer: the client hears of it by the end of its connection, and asks for the rest.
        log.warning("content could not be sent to its end", extra={"digest": str(blob.digest), "cause": exc.message})
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("The store broke off.") from exc
    await response.write_eof()
    return response
