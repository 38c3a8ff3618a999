"""The shelf of a builder whose images are in another registry: requests are passed on, with the builder's login there.

So whoever pulls needs one name and one login wherever the images are, and sees one organization's. Bytes stream
through; nothing is kept.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import aiohttp
from aiohttp import web

from ekiben.errors import DataLoss, EkibenError, NotFound, ResourceExhausted, Unavailable
from services.builder.shelves import Manifest, Shown
from services.content.digest import Digest
from services.content.images import Descriptor
from services.content.images.registry.client import Client, Refused
from services.content.images.registry.names import parse
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.problems import Broken
from services.content.images.registry.store import RegistryImageStore, open_registry
from services.content.images.resolving import MANIFESTS

_PASSED_ON = ("Content-Length", "Content-Range")


@asynccontextmanager
async def open_forwarding(prefix: str, options: RegistryOptions | None = None) -> AsyncIterator["ForwardingShelf"]:
    """The shelf of `HOST` or `HOST/PREFIX`; its connections are closed at the end."""
    shelf = ForwardingShelf(prefix, options or RegistryOptions.from_environment())
    try:
        yield shelf
    finally:
        await shelf.close()


class ForwardingShelf:
    """The repositories below a prefix of a registry."""

    def __init__(self, prefix: str, options: RegistryOptions) -> None:
        self._prefix = prefix.rstrip("/")
        self._options = options
        self._clients: dict[str, Client] = {}

    async def names(self, organization: str) -> Sequence[str] | None:
        """See Shelf. Registries list repositories to their administrators, if at all."""
        return None

    async def find(self, name: str) -> Shown | None:
        """See Shelf. Nobody asks before something of the repository is wanted."""
        organization, _, repository = name.partition("/")
        client = self._clients.get(organization)
        if client is None:
            # With a word more: one alone is another repository on Docker Hub, `library/…`.
            location = parse(f"{self._prefix}/{organization}/repository")
            location = replace(location, repository=location.repository.removesuffix("/repository"))
            client = Client(location, self._options)
            self._clients[organization] = client
        return _Shown(f"{self._prefix}/{name}", repository, client, self._options)

    async def close(self) -> None:
        """End all connections."""
        for client in self._clients.values():
            await client.close()


class _Shown:
    def __init__(self, name: str, repository: str, client: Client, options: RegistryOptions) -> None:
        self._name = name
        self._repository = repository
        self._client = client
        self._options = options
        self._scopes = client.scopes("pull", f"{client.location.repository}/{repository}")

    async def tags(self) -> Sequence[str]:
        async with self._store() as store:
            return await store.references()

    async def manifest(self, reference: str | Digest) -> Manifest | None:
        path, headers = f"{self._repository}/manifests/{reference}", {"Accept": ", ".join(MANIFESTS)}
        with _as_ours():
            answer = await self._client.ask("GET", path, "give a manifest", (200, 404), self._scopes, headers=headers)
        if answer.status == 404:
            return None
        digest = Digest(hashlib.sha256(answer.body).hexdigest())
        if isinstance(reference, Digest) and digest != reference:
            raise DataLoss(f"The registry gave another manifest than {reference}.", reason="MANIFEST_DAMAGED")
        return Manifest(digest, answer.content_type, answer.body)

    async def send(
        self, request: web.Request, digest: Digest, headers: dict[str, str], count: Callable[[int], None]
    ) -> web.StreamResponse | None:
        asked = {name: request.headers[name] for name in ("Range", "If-Range") if name in request.headers}
        what, path = "give a blob", f"{self._repository}/blobs/{digest}"
        with _as_ours():
            try:
                found = await self._client.once(
                    request.method,
                    await self._client.url(path),
                    what,
                    (200, 206, 404, 416),
                    self._scopes,
                    headers=asked,
                )
            except Broken as exc:
                raise exc.error(self._client.location.host, what) from exc
            except Refused as exc:
                raise exc.error from None
        async with found:
            if found.status == 404:
                return None
            told = {name: found.headers[name] for name in _PASSED_ON if name in found.headers}
            if found.status == 416:
                return web.Response(status=416, headers=headers | {**told, "Content-Length": "0"})
            response = web.StreamResponse(status=found.status, headers=headers | told)
            await response.prepare(request)
            if request.method == "HEAD":
                return response
            try:
                async for chunk in found.content.iter_any():
                    await response.write(chunk)
                    count(len(chunk))
            except (aiohttp.ClientPayloadError, TimeoutError) as exc:
                # Half an answer: the client hears of it by the end of its connection, and asks for the rest.
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError("The registry broke off.") from exc
            await response.write_eof()
            return response

    async def referrers(self, digest: Digest) -> Sequence[Descriptor]:
        async with self._store() as store:
            return await store.referrers(digest)

    @asynccontextmanager
    async def _store(self) -> AsyncIterator[RegistryImageStore]:
        with _as_ours():
            async with open_registry(self._name, self._options) as (store, _):
                yield store


@contextmanager
def _as_ours() -> Iterator[None]:
    """What the registry refuses the builder is not what the builder refuses its caller."""
    try:
        yield
    except (NotFound, DataLoss, ResourceExhausted, Unavailable):
        raise
    except EkibenError as exc:
        raise Unavailable(
            f"The registry where the images are refuses the builder: {exc.message}", reason="IMAGES_REFUSED"
        ) from exc
