"""A blob as an answer, or a range of it: what lies in the page cache by sendfile, the rest through threads.

Sendfile of what is not in memory would wait for the disk in the event loop, and everybody with it.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from aiohttp import web

from ekiben.errors import DataLoss, NotFound
from services.content.images import Descriptor

log = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20
_READ_BYTES = 1 << 20


async def send_blob(
    request: web.Request, path: Path, blob: Descriptor, headers: dict[str, str], count: Callable[[int], None]
) -> web.StreamResponse:
    """Answer with the file at `path`, or with the range that is asked for. `count` is told what passes.

    Raises:
        NotFound: no such file (BLOB_NOT_FOUND).
        DataLoss: its size is not the blob's (BLOB_DAMAGED).
    """
    try:
        file = await asyncio.to_thread(path.open, "rb", 0)
    except FileNotFoundError:
        raise NotFound(
            f"Blob {blob.digest} is named, but its bytes are gone: build the image again.",
            reason="BLOB_NOT_FOUND",
            digest=blob.digest,
        ) from None
    with file:
        size = (await asyncio.to_thread(os.fstat, file.fileno())).st_size
        if size != blob.size_bytes:
            raise DataLoss(
                f"Blob {blob.digest} has {size} bytes where {blob.size_bytes} should be: build the image again.",
                reason="BLOB_DAMAGED",
                digest=blob.digest,
            )
        if any(each.value in ("*", str(blob.digest)) for each in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        start, stop, status = _range(request, blob)
        if status == 416:
            return web.Response(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
        if status == 206:
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = stop - start
        await response.prepare(request)
        if request.method != "HEAD":
            try:
                await _send(request, response, file, start, stop, count)
            except ConnectionError:
                raise
            except OSError as exc:
                # The answer has begun: its rest must not be the words of another one.
                log.error("a blob could not be sent to its end", extra={"digest": str(blob.digest), "cause": str(exc)})
                raise ConnectionResetError("The blob cannot be read to its end.") from exc
            await response.write_eof()
        return response


def _range(request: web.Request, blob: Descriptor) -> tuple[int, int, int]:
    """First byte, the one after the last, and the status. What is no range of bytes is as good as none."""
    size = blob.size_bytes
    condition = request.headers.get("If-Range")
    try:
        asked = request.http_range
    except ValueError:
        return 0, size, 200
    if (asked.start is None and asked.stop is None) or (condition and condition != f'"{blob.digest}"'):
        return 0, size, 200
    start, stop, _ = asked.indices(size)
    return (start, stop, 206) if start < stop else (0, 0, 416)


async def _send(
    request: web.Request,
    response: web.StreamResponse,
    file: IO[bytes],
    at: int,
    stop: int,
    count: Callable[[int], None],
) -> None:
    loop = asyncio.get_running_loop()
    while at < stop:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("The client has left.")
        piece = min(_PIECE_BYTES, stop - at)
        if _is_cached(file.fileno(), at) and _is_cached(file.fileno(), at + piece - 1):
            sent = await loop.sendfile(transport, file, at, piece)
        else:
            chunk = await asyncio.to_thread(os.pread, file.fileno(), min(_READ_BYTES, stop - at), at)
            await response.write(chunk)
            sent = len(chunk)
        if not sent:
            # Half an answer: the client hears of it by the end of its connection.
            transport.abort()
            raise ConnectionResetError("The file became shorter while it was sent.")
        count(sent)
        at += sent


def _is_cached(fd: int, offset: int) -> bool:
    """Whether what lies at `offset` is in memory: read it only if it is."""
    try:
        return bool(os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT))
    except (OSError, AttributeError):
        return False
