"""Images in one repository of a registry.

Source: OCI distribution-spec 1.1.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from services.content.digest import Digest
from services.content.images import (
    INDEX,
    Again,
    BlobsMissing,
    Descriptor,
    Image,
    Platform,
    attached,
    canonical,
)
from services.content.images.registry.client import Client, Refused
from services.content.images.registry.downloads import download
from services.content.images.registry.names import Location, parse
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.pages import pages
from services.content.images.registry.problems import Broken, number
from services.content.images.registry.uploads import Upload
from services.content.images.resolving import MANIFESTS, MAX_MANIFEST_BYTES, damaged, for_platform, object_of

_CHUNK_BYTES = 1 << 20
_PAGE = 1000
_LOST = {"MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "MANIFEST_UNKNOWN"}
_ATTEMPTS = 5
"""To write the list of what is attached, where somebody else writes it too."""
_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""Who may write the list of one image, within this process."""


class RegistryImageStore:
    """A repository. Open it by `open_registry`."""

    def __init__(self, location: Location, client: Client, options: RegistryOptions) -> None:
        self._location = location
        self._client = client
        self._sending = asyncio.Semaphore(options.parallel)
        self._pull, self._push = client.scopes("pull"), client.scopes("pull,push")
        self._delete = client.scopes("pull,push,delete")

    @property
    def name(self) -> str:
        """See ImageStore."""
        return str(self._location)

    async def size(self, digest: Digest) -> int | None:
        """See ImageStore."""
        what = f"tell whether it has blob {str(digest)[:19]}"
        answer = await self._client.ask("HEAD", f"blobs/{digest}", what, (200, 404), self._pull)
        return number(answer.headers.get("Content-Length", "")) if answer.status == 200 else None

    async def write(self, chunks: AsyncIterable[bytes], expected: Descriptor | None = None) -> tuple[Digest, int]:
        """See ImageStore. What fits into a chunk can always be had again."""
        if isinstance(chunks, AsyncIterator):
            begun, ended = await _begin(chunks)
            if ended:
                whole = Descriptor("", Digest(hashlib.sha256(begun).hexdigest()), len(begun))
                chunks, expected = Again(lambda: _one(begun)), expected or whole
            else:
                chunks = _joined(begun, chunks)
        async with self._sending:
            return await Upload(self._client, chunks, expected).run()

    async def mount(self, descriptor: Descriptor, origin: str) -> bool:
        """See ImageStore: from another repository of the same registry, if it lets us."""
        if not origin.startswith("docker://"):
            return False
        there = parse(origin.removeprefix("docker://"))
        if there.host != self._location.host or there.repository == self._location.repository:
            return False
        what = f"mount blob {str(descriptor.digest)[:19]} of {there.repository}"
        url = (await self._client.url("blobs/uploads/")).with_query(mount=str(descriptor.digest))
        url = url.update_query({"from": there.repository})
        scopes = self._push | self._client.scopes("pull", there.repository)
        try:
            async with await self._client.once("POST", url, what, (201, 202), scopes, body=b"") as response:
                if response.status == 201:
                    return True
                place = response.headers.get("Location", "")
            if place:  # it opened a session in place of it
                place_url = await self._client.beside(place, url)
                (await self._client.once("DELETE", place_url, what, (202, 204), self._push)).release()
        except (Broken, Refused, Unauthenticated, PermissionDenied):
            pass  # it is sent then, and whatever else is wrong shows there
        return False

    def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore. A download that breaks off goes on where it was."""
        return download(self._client, descriptor, self._pull)

    async def find(self, reference: str) -> Descriptor:
        """See ImageStore. An empty reference is the tag `latest`."""
        descriptor, _ = await self._manifest(reference or "latest")
        return descriptor

    async def resolve(self, reference: str, platform: Platform) -> tuple[Descriptor, Image]:
        """See ImageStore; as `find`."""
        descriptor = await self.find(reference)
        return await for_platform(self, [descriptor], platform, f"{self.name}:{reference or 'latest'}")

    async def keep(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore."""
        descriptor, _ = await self._put(str(_digest(manifest)), manifest, media_type)
        return descriptor

    async def tag(self, reference: str, manifest: bytes, media_type: str, platform: Platform | None) -> Descriptor:
        """See ImageStore."""
        descriptor, _ = await self._put(reference or "latest", manifest, media_type)
        return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size_bytes, platform=platform)

    async def untag(self, tags: Iterable[str], of: Digest) -> None:
        """Let tags name nothing any more, those that name the manifest `of`. What nothing names is the registry's to
        collect.

        Raises:
            FailedPrecondition: the registry takes no tags away (TAGS_NOT_DELETABLE).
        """
        for tag in tags:
            try:
                found = await self.find(tag)
            except NotFound:
                continue
            if found.digest == of:
                what = f"take away the tag {tag}"
                accepted = (200, 202, 204, 400, 403, 404, 405, 501)
                answer = await self._client.ask("DELETE", f"manifests/{tag}", what, accepted, self._delete)
                if answer.status >= 400 and answer.status != 404:
                    raise FailedPrecondition(
                        f"{self._location.host} does not let us take tags away: {answer}. What {tag} names stays in "
                        f"{self.name}: delete it there, give this login the right, or let the registry delete "
                        "(REGISTRY_STORAGE_DELETE_ENABLED=true for distribution).",
                        reason="TAGS_NOT_DELETABLE",
                        image=f"{self.name}:{tag}",
                    )

    async def restore(self, tags: Iterable[str], of: Digest) -> None:
        """Let those of the tags that name nothing name a manifest that is kept.

        Raises:
            BlobsMissing: it is not there any more.
        """
        for tag in tags:
            try:
                await self.find(tag)
            except NotFound:
                try:
                    descriptor, content = await self._manifest(str(of))
                except NotFound:
                    raise BlobsMissing(self.name, [of]) from None
                await self._put(tag, content, descriptor.media_type)

    async def references(self) -> Sequence[str]:
        """See ImageStore. A repository that is not there has none."""
        found: list[str] = []
        async for answer in pages(self._client, f"tags/list?n={_PAGE}", "list its tags", self._pull):
            if answer.status == 404:
                return []
            found += object_of(answer.body, "The list of tags").get("tags") or []
        return sorted(set(found))

    async def attach(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore. Where the registry does not list attachments itself, the tag `sha256-<hex>` does."""
        content = object_of(manifest, "The manifest")
        if not isinstance(content.get("subject"), dict):
            raise InvalidArgument("The manifest has no subject to be attached to.", reason="MANIFEST_INVALID")
        subject = Descriptor.from_json(content["subject"]).digest
        kept, listed = await self._put(str(_digest(manifest)), manifest, media_type)
        descriptor = attached(kept, content)
        if not listed:
            async with _turns.setdefault(f"{self.name}@{subject}", asyncio.Lock()):
                await self._list(subject, descriptor)
        return descriptor

    async def referrers(self, subject: Digest) -> Sequence[Descriptor]:
        """See ImageStore."""
        found: list[Descriptor] = []
        path, what = f"referrers/{subject}", f"list what is attached to {str(subject)[:19]}"
        async for answer in pages(self._client, path, what, self._pull, {"Accept": INDEX}):
            if answer.status == 404:
                return await self._listed(subject)
            found += _entries(object_of(answer.body, "The list of what is attached"))
        return sorted({each.digest: each for each in found}.values(), key=lambda each: each.digest)

    async def _list(self, subject: Digest, descriptor: Descriptor) -> None:
        """Add to the list under the tag, and look whether it is there: another process may have replaced it.

        One that replaces it later, from what it read before, is not noticed: registries have no write on a condition.
        """
        for _ in range(_ATTEMPTS):
            there = await self._listed(subject)
            if any(each.digest == descriptor.digest for each in there):
                return
            index = {
                "schemaVersion": 2,
                "mediaType": INDEX,
                "manifests": [each.to_json() for each in sorted([*there, descriptor], key=lambda each: each.digest)],
            }
            await self._put(f"sha256-{subject.hex}", canonical(index), INDEX)
        if not any(each.digest == descriptor.digest for each in await self._listed(subject)):
            raise Broken("others write the list of attachments all the time").error(
                self._location.host, f"keep {str(descriptor.digest)[:19]} in the list of what is attached"
            )

    async def _listed(self, subject: Digest) -> list[Descriptor]:
        try:
            _, content = await self._manifest(f"sha256-{subject.hex}")
        except NotFound:
            return []
        return _entries(object_of(content, "The list of what is attached"))

    async def _manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        what = f"give the manifest {reference[:40]}"
        path, headers = f"manifests/{reference}", {"Accept": ", ".join(MANIFESTS)}
        answer = await self._client.ask("GET", path, what, (200, 404), self._pull, headers=headers)
        if answer.status == 404:
            raise NotFound(
                f"{self.name} has no image {reference!r} ({answer}). Check the name and the tag.",
                reason="IMAGE_NOT_FOUND",
                image=f"{self.name}:{reference}",
            )
        content, media_type = answer.body, answer.content_type
        told = answer.headers.get("Docker-Content-Digest", "")
        digest = _digest(content)
        wanted = reference if reference.startswith("sha256:") else told if told.startswith("sha256:") else str(digest)
        if str(digest) != wanted:
            raise damaged(self.name, Digest.parse(wanted))
        if media_type not in MANIFESTS:
            media_type = str(object_of(content, f"Manifest {digest}").get("mediaType") or media_type)
        return Descriptor(media_type, digest, len(content)), content

    async def _put(self, reference: str, manifest: bytes, media_type: str) -> tuple[Descriptor, bool]:
        """Put a manifest; also whether the registry lists it among what is attached to its subject."""
        if len(manifest) > MAX_MANIFEST_BYTES:
            raise InvalidArgument(
                "The manifest is larger than 4 MiB, which registries refuse.", reason="MANIFEST_INVALID"
            )
        what, path = f"take the manifest of {reference[:40]}", f"manifests/{reference}"
        request: dict[str, Any] = {"headers": {"Content-Type": media_type}, "body": manifest}
        answer = await self._client.ask("PUT", path, what, (201, 200, 202, 400, 404), self._push, **request)
        digest = _digest(manifest)
        if answer.status >= 400:
            lost = [each for each in answer.digests() if each != digest]
            if answer.codes & _LOST and (lost or "MANIFEST_BLOB_UNKNOWN" in answer.codes):
                raise BlobsMissing(self.name, lost)
            raise answer.error(self._location.host, self._location.repository, what)
        told = answer.headers.get("Docker-Content-Digest", "")
        if told.startswith("sha256:") and told != str(digest):
            raise damaged(self.name, digest)
        return Descriptor(media_type, digest, len(manifest)), "OCI-Subject" in answer.headers


@contextlib.asynccontextmanager
async def open_registry(
    name: str, options: RegistryOptions | None = None
) -> AsyncIterator[tuple[RegistryImageStore, str]]:
    """The repository that `HOST/REPOSITORY[:TAG|@DIGEST]` names, and the reference. Nothing is asked yet.

    Raises:
        InvalidArgument: another form (IMAGE_NAME_INVALID).
        FailedPrecondition: a certificate for it cannot be used (REGISTRY_CERTIFICATE_INVALID).
    """
    location = parse(name)
    options = options or RegistryOptions.from_environment()
    client = Client(location, options)
    try:
        yield RegistryImageStore(location, client, options), location.reference
    finally:
        await client.close()


def _digest(content: bytes) -> Digest:
    return Digest(hashlib.sha256(content).hexdigest())


def _entries(index: dict[str, Any]) -> list[Descriptor]:
    return [Descriptor.from_json(each) for each in index.get("manifests") or ()]


async def _begin(chunks: AsyncIterator[bytes]) -> tuple[bytes, bool]:
    """About the first MiB, and whether that is all."""
    begun = bytearray()
    while len(begun) < _CHUNK_BYTES:
        if (chunk := await anext(chunks, None)) is None:
            return bytes(begun), True
        begun += chunk
    return bytes(begun), False


async def _joined(begun: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield begun
    async for chunk in chunks:
        yield chunk


async def _one(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk
