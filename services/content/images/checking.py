"""Whether images are whole: everything that references lead to is there, and, if that is asked, right.

Manifests are always read, and checked against their digests; layers and configurations are asked for by size, or read.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.images import REF_NAME, Descriptor, ImageStore
from services.content.images.layout import LayoutImageStore
from services.content.images.resolving import INDEXES, MANIFESTS, MAX_MANIFEST_BYTES, object_of


@dataclass(frozen=True)
class Fault:
    """Something that an image has not, or not as it should be."""

    reference: str
    """The first that leads to it."""
    digest: Digest
    what: str
    """`layer`, `configuration`, `manifest`."""
    why: str
    """In words."""


@dataclass
class Checked:
    """What was looked at."""

    references: int = 0
    blobs: int = 0
    size_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)


async def check(store: ImageStore, references: Sequence[str] = (), *, whole: bool = False) -> Checked:
    """Look at everything that the references lead to, and at what is attached to it; at all of a store's if none are
    given. Each blob once, however many images have it. `whole` reads layers too.

    Raises:
        EkibenError: the store cannot be asked.
    """
    checked, seen = Checked(), set[Digest]()
    for reference in references or await store.references():
        checked.references += 1
        try:
            named = await store.find(reference)
        except (NotFound, DataLoss, InvalidArgument) as exc:
            digest = exc.metadata.get("digest", "") if isinstance(exc, NotFound | DataLoss) else ""
            checked.faults.append(Fault(reference, _digest(digest), "manifest", exc.message))
            continue
        await _follow(store, reference, named, checked, seen, whole)
    if isinstance(store, LayoutImageStore) and not references:
        for entry in await store.entries():  # what is attached has no name, and is not found where it is damaged
            if REF_NAME not in entry.annotations:
                await _follow(store, "(attached)", entry, checked, seen, whole)
    return checked


async def _follow(
    store: ImageStore, reference: str, named: Descriptor, checked: Checked, seen: set[Digest], whole: bool
) -> None:
    waiting = [(named, "manifest")]
    while waiting:
        descriptor, what = waiting.pop()
        if descriptor.digest in seen:
            continue
        seen.add(descriptor.digest)
        checked.blobs += 1
        checked.size_bytes += descriptor.size_bytes
        try:
            waiting += [each async for each in _look(store, descriptor, what, whole)]
        except (NotFound, DataLoss, InvalidArgument) as exc:
            checked.faults.append(Fault(reference, descriptor.digest, what, exc.message))


async def _look(
    store: ImageStore, descriptor: Descriptor, what: str, whole: bool
) -> AsyncIterator[tuple[Descriptor, str]]:
    """Look at one blob, and give those that it leads to."""
    if what != "manifest":
        size_bytes = await store.size(descriptor.digest)
        if size_bytes is None:
            raise NotFound(f"{store.name} has it not.", reason="BLOB_NOT_FOUND", digest=descriptor.digest)
        if size_bytes != descriptor.size_bytes:
            raise DataLoss(
                f"It has {size_bytes} bytes where its manifest says {descriptor.size_bytes}.",
                reason="BLOB_DAMAGED",
                digest=descriptor.digest,
            )
        if whole:
            async for _ in store.read(descriptor):
                pass
        return
    if descriptor.media_type not in MANIFESTS or descriptor.size_bytes > MAX_MANIFEST_BYTES:
        raise InvalidArgument(f"It is of type {descriptor.media_type}, no image.", reason="MANIFEST_INVALID")
    content = object_of(b"".join([chunk async for chunk in store.read(descriptor)]), str(descriptor.digest))
    if descriptor.media_type in INDEXES:
        for each in content.get("manifests") or ():
            yield Descriptor.from_json(each), "manifest"
    else:
        yield Descriptor.from_json(content.get("config")), "configuration"
        for each in content.get("layers") or ():
            yield Descriptor.from_json(each), "layer"
    for attached in await store.referrers(descriptor.digest):
        yield attached, "manifest"


def _digest(text: object) -> Digest:
    try:
        return Digest.parse(str(text))
    except InvalidArgument:
        return Digest("0" * 64)
