"""What every store says of the parts of an upload."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.content.blobs import WHOLE
from services.content.digest import Digest


class Received(Protocol):
    """A part that arrived."""

    @property
    def etag(self) -> str: ...


R = TypeVar("R", bound=Received)


def listed(received: Mapping[int, R], wanted: Sequence[tuple[int, str]], upload: str) -> list[R]:
    """The parts that the caller lists, which must be all there are, from 1 on; none listed means the whole.

    BentoML's client lists what it has even after a part failed; to join that would make a shorter
    archive visible.

    Raises:
        FailedPrecondition: they are not (UPLOAD_INCOMPLETE).
    """
    if not wanted:
        whole = received.get(WHOLE)
        if whole is None:
            raise incomplete("The content was not sent as a whole", upload)
        return [whole]
    found: list[R] = []
    for place, (number, etag) in enumerate(wanted, start=1):
        part = received.get(number)
        if number != place:
            raise incomplete(f"Part {place} is missing from the list", upload)
        if part is None:
            raise incomplete(f"Part {number} was not received", upload)
        if etag.strip('"') != part.etag.strip('"'):
            raise incomplete(f"Part {number} was received as {part.etag}, not as {etag}", upload)
        found.append(part)
    unlisted = sorted(number for number in received if number > len(found))
    if unlisted:
        raise incomplete(f"Part {unlisted[0]} was received and is not listed", upload)
    return found


def busy(upload: str) -> FailedPrecondition:
    """The upload is being joined or ended."""
    return FailedPrecondition(
        f"Upload {upload!r} is being completed or ended: it takes no parts.", reason="UPLOAD_BUSY", upload=upload
    )


def incomplete(what: str, upload: str) -> FailedPrecondition:
    """A part is missing."""
    return FailedPrecondition(
        f"{what}. Send what is missing, then complete the upload again.", reason="UPLOAD_INCOMPLETE", upload=upload
    )


def wrong_size(wanted: int, got: str) -> InvalidArgument:
    """More or fewer bytes came than were announced."""
    return InvalidArgument(
        f"{got} bytes were sent where {wanted} were announced. Send the part again.",
        reason="SIZE_MISMATCH",
        expected_bytes=wanted,
        received_bytes=got,
    )


def wrong_digest(wanted: Digest, got: Digest) -> InvalidArgument:
    """What was sent is not what was announced."""
    return InvalidArgument(
        f"The bytes sent have the digest {got}, not {wanted}. They were damaged on the way: send them again.",
        reason="DIGEST_MISMATCH",
        expected=wanted,
        received=got,
    )
