"""A blob on its way out of a registry: hashed as it passes, and gone on with where it broke off.

Source: OCI distribution-spec 1.1, "Pulling blobs"; RFC 9110, 14 (ranges).
"""

import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp

from ekiben.errors import NotFound
from services.content.images import Descriptor
from services.content.images.registry.client import Client, Patience, Refused
from services.content.images.registry.problems import Broken
from services.content.images.resolving import MANIFESTS, damaged

_CHUNK_BYTES = 1 << 20


async def download(client: Client, descriptor: Descriptor, scopes: frozenset[str]) -> AsyncIterator[bytes]:
    """A blob or a manifest, in chunks of about 1 MiB; see ImageStore.read."""
    name = str(client.location)
    what = f"give {str(descriptor.digest)[:19]}"
    patience, hashed, offset = Patience(client.options), hashlib.sha256(), 0
    while True:
        try:
            async with contextlib.aclosing(_since(client, descriptor, scopes, offset, what)) as chunks:
                async for chunk in chunks:
                    hashed.update(chunk)
                    offset += len(chunk)
                    if offset > descriptor.size_bytes:
                        raise damaged(name, descriptor.digest)
                    patience.progress()
                    yield chunk
            if offset == descriptor.size_bytes:
                break
            raise Broken(f"it ended after {offset} of {descriptor.size_bytes} bytes")
        except Broken as exc:
            await patience.wait(exc, client.location.host, what)
        except Refused as exc:
            raise exc.error from None
    if hashed.hexdigest() != descriptor.digest.hex:
        raise damaged(name, descriptor.digest)


async def _since(
    client: Client, descriptor: Descriptor, scopes: frozenset[str], offset: int, what: str
) -> AsyncGenerator[bytes, None]:
    """The bytes from an offset on, in chunks of about 1 MiB."""
    manifest = descriptor.media_type in MANIFESTS
    path = f"{'manifests' if manifest else 'blobs'}/{descriptor.digest}"
    headers = {"Accept": ", ".join(MANIFESTS)} if manifest else {}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    response = await client.once("GET", await client.url(path), what, (200, 206, 404, 416), scopes, headers=headers)
    async with response:
        if response.status == 404:
            raise NotFound(
                f"{client.location} has no blob {descriptor.digest}: the image there is not whole. Push it again.",
                reason="BLOB_NOT_FOUND",
                digest=descriptor.digest,
            )
        if response.status == 416:
            raise damaged(str(client.location), descriptor.digest)  # what is there ends before
        skip = offset if response.status == 200 else 0  # ranges are an offer, not a promise
        waiting: list[bytes] = []
        size = 0
        try:
            async for chunk in response.content.iter_any():
                if skip:
                    chunk, skip = chunk[skip:], max(skip - len(chunk), 0)
                waiting.append(chunk)
                size += len(chunk)
                if size >= _CHUNK_BYTES:
                    yield b"".join(waiting)
                    waiting, size = [], 0
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            if size:
                yield b"".join(waiting)
            raise Broken(f"the download broke off ({type(exc).__name__})") from exc
        if size:
            yield b"".join(waiting)
