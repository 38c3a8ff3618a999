"""How the parts of an upload become one object."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ekiben.errors import FailedPrecondition
from services.content.blobs import WHOLE, Part
from services.content.blobs.parts import incomplete, listed, wrong_size
from services.content.blobs.s3.bucket import Bucket, Found, Missing, Refused
from services.content.blobs.s3.location import MIN_PART_BYTES
from services.content.blobs.s3.records import Records, State, content_key, record_key


@dataclass(frozen=True, slots=True)
class Piece:
    """A part that arrived; `small` where it is still an object of its own."""

    part: Part
    small: Found | None = None

    @property
    def etag(self) -> str:
        """Of the part."""
        return self.part.etag


async def received(bucket: Bucket, upload: str, state: State) -> dict[int, Piece]:
    """What has arrived and was not joined yet."""
    key = content_key(upload)
    found: dict[int, tuple[datetime, Piece]] = {}
    for number, etag, size_bytes, time in await _parts(bucket, key, state.parts_id):
        found[number] = (time, Piece(Part(number, etag, size_bytes)))
    for number, small in state.small.items():
        if number not in found or found[number][0] <= small.modify_time:
            found[number] = (small.modify_time, Piece(Part(number, small.etag, small.size_bytes), small))
    pieces = {number: piece for number, (_, piece) in found.items()}
    whole = state.whole
    if whole is not None and whole.parts:
        pieces[WHOLE] = Piece(Part(WHOLE, whole.etag, whole.size_bytes))
    elif whole is not None:
        for number, etag, size_bytes, _ in await _parts(bucket, key, whole.upload_id):
            if number == 1:
                pieces[WHOLE] = Piece(Part(WHOLE, etag, size_bytes))
    return pieces


async def _parts(bucket: Bucket, key: str, upload_id: str) -> list[tuple[int, str, int, datetime]]:
    try:
        return await bucket.parts(key, upload_id) if upload_id else []
    except Missing:
        return []


async def join(bucket: Bucket, records: Records, upload: str, parts: Sequence[tuple[int, str]]) -> Found:
    """Make `content/<upload>` of these parts, or find it made of them before. See BlobWriter.assemble for the errors.

    What is to be joined is noted first: a second call, after a crash or an answer that was lost, then knows of which
    parts the content is that it finds.
    """
    key = content_key(upload)
    state = await records.load(upload)
    if state.joined is not None:
        chosen = listed({part.number: part for part in state.joined}, parts, upload)
        try:
            return _whole(await bucket.head(key), chosen)
        except Missing:
            pass  # noted, not made
    pieces = listed(await received(bucket, upload, state), parts, upload)
    for piece in pieces[:-1]:
        if piece.small is None and piece.part.size_bytes < MIN_PART_BYTES:
            raise _too_small(piece.part)
    chosen = [piece.part for piece in pieces]
    if state.joined is None and not await records.keep_joined(upload, chosen):
        return await join(bucket, records, upload, parts)  # another registry noted something meanwhile
    try:
        await _make(bucket, upload, state, pieces)
    except Refused as exc:
        await bucket.delete(record_key(upload, "joined"))
        if exc.code == "EntityTooSmall":
            raise _too_small(min(chosen[:-1] or chosen, key=lambda part: part.size_bytes)) from exc
        raise incomplete("A part was sent anew meanwhile", upload) from exc
    except Missing as exc:
        raise incomplete("The parts are gone", upload) from exc
    return _whole(await bucket.head(key), chosen)


async def _make(bucket: Bucket, upload: str, state: State, pieces: list[Piece]) -> None:
    key = content_key(upload)
    if pieces[0].part.number == WHOLE:
        assert state.whole is not None
        await bucket.complete(key, state.whole.upload_id, state.whole.parts or [(1, pieces[0].etag)])
        return
    if all(piece.small is not None for piece in pieces):
        upload_id = await bucket.start(key)
        await bucket.complete(key, upload_id, await _gather(bucket, key, upload_id, pieces))
        return
    done = []
    for piece in pieces:
        etag = piece.etag
        if piece.small is not None:
            if piece is not pieces[-1]:
                raise _too_small(piece.part)
            etag = await bucket.put_part(
                key, state.parts_id, piece.part.number, memoryview(await bucket.get(piece.small.key))
            )
        done.append((piece.part.number, etag))
    await bucket.complete(key, state.parts_id, done)


async def _gather(bucket: Bucket, key: str, upload_id: str, pieces: list[Piece]) -> list[tuple[int, str]]:
    """Parts that are large enough, of pieces that are not."""
    done: list[tuple[int, str]] = []
    gathered = bytearray()
    for piece in pieces:
        assert piece.small is not None
        gathered += await bucket.get(piece.small.key)
        if len(gathered) >= MIN_PART_BYTES or piece is pieces[-1]:
            number = len(done) + 1
            done.append((number, await bucket.put_part(key, upload_id, number, memoryview(gathered))))
            gathered = bytearray()
    return done


def _whole(found: Found, chosen: list[Part]) -> Found:
    size_bytes = sum(part.size_bytes for part in chosen)
    if found.size_bytes != size_bytes:
        raise wrong_size(size_bytes, str(found.size_bytes))
    return found


def _too_small(part: Part) -> FailedPrecondition:
    return FailedPrecondition(
        f"Part {part.number} has {part.size_bytes:,} bytes; every part but the last needs {MIN_PART_BYTES:,}, since it "
        "was sent to S3. Send larger ones.",
        reason="PART_TOO_SMALL",
        part_number=part.number,
    )
