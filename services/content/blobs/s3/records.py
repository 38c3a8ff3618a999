"""What the bucket knows of an upload that is under way: small objects below `uploads/<upload>/`.

- `open`: there is such an upload. Comes first: whoever looks for what was left behind looks for records.
- `parts`, `whole`: the multipart upload that takes numbered parts, and the one that takes the content in one piece.
  Two registries that begin one at once agree, because an object is written only where there is none.
- `small-<number>`: a part too small for S3, until its upload is joined.
- `joined`: the parts of which `content/<upload>` is or will be made.

What becomes of an upload is in `ends/<upload>`, written once: either `commit <hex> <size>`, or `discard`; later perhaps
`delete <hex>`. It stays as long as the blob: a record that somebody writes late would else make garbage of its content.

All multipart uploads write the object `content/<upload>`, and only by being completed, which nobody else may do.
A URL that a client still holds is for a part of one that has ended: it cannot change content that was checked.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from services.content.blobs import Part
from services.content.blobs.s3.bucket import Bucket, Found, Missing

_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Whole:
    """Content in one piece: part 1 of a multipart upload that a client writes, or all `parts` of one that we wrote."""

    upload_id: str
    parts: tuple[tuple[int, str], ...] = ()
    etag: str = ""
    size_bytes: int = 0


@dataclass
class State:
    """The records of one upload."""

    keys: list[str] = field(default_factory=list)
    parts_id: str = ""
    whole: Whole | None = None
    small: dict[int, Found] = field(default_factory=dict)
    joined: list[Part] | None = None
    end: tuple[str, ...] = ()


def content_key(upload: str) -> str:
    """Where the bytes of an upload are, visible or not."""
    return f"content/{upload}"


def record_key(upload: str, name: str) -> str:
    """One of its records."""
    return f"uploads/{upload}/{name}"


def end_key(upload: str) -> str:
    """What becomes of it."""
    return f"ends/{upload}"


class Records:
    """Reads and writes them."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._ids: OrderedDict[str, str] = OrderedDict()

    async def open(self, upload: str) -> None:
        """Note that there is such an upload, before anything of it is written."""
        key = record_key(upload, "open")
        if key not in self._ids:
            await self._bucket.put(key, b"")
            self._remember(key, "")

    async def multipart(self, upload: str, name: str) -> str | None:
        """The id of its multipart upload for `parts` or `whole`, begun where there is none.

        None for a `whole` that we received ourselves: a client cannot replace it.
        """
        key = record_key(upload, name)
        if key in self._ids:
            return self._ids[key]
        await self.open(upload)
        found = await self._get(key)
        if found is None:
            upload_id = await self._bucket.start(content_key(upload))
            if not await self._bucket.put_once(key, _json({"id": upload_id})):
                found = await self._get(key)
                if found is None or found["id"] != upload_id:
                    await self._bucket.abort(content_key(upload), upload_id)
            if found is None:
                found = {"id": upload_id}
        if "parts" in found:
            return None
        self._remember(key, found["id"])
        return str(found["id"])

    async def keep_whole(self, upload: str, whole: Whole) -> None:
        """Let content that was received in one piece count, in place of an earlier one."""
        key = record_key(upload, "whole")
        earlier = await self._get(key)
        body = {"id": whole.upload_id, "parts": whole.parts, "etag": whole.etag, "size_bytes": whole.size_bytes}
        await self._bucket.put(key, _json(body))
        self._ids.pop(key, None)
        if earlier is not None:
            await self._bucket.abort(content_key(upload), earlier["id"])

    async def keep_joined(self, upload: str, parts: list[Part]) -> bool:
        """Note of which parts its content is made; False when that was noted before."""
        listed = [[part.number, part.etag, part.size_bytes] for part in parts]
        return await self._bucket.put_once(record_key(upload, "joined"), _json(listed))

    async def load(self, upload: str) -> State:
        """All records of an upload."""
        state = State()
        async for found in self._bucket.objects(record_key(upload, "")):
            state.keys.append(found.key)
            name = found.key.rpartition("/")[2]
            if name.startswith("small-"):
                state.small[int(name.removeprefix("small-"))] = found
        for key in state.keys:
            name = key.rpartition("/")[2]
            if name in ("parts", "whole", "joined") and (body := await self._read(key)) is not None:
                _fill(state, name, body)
        state.end = tuple((await self._read(end_key(upload)) or b"").decode().split())
        return state

    async def forget(self, upload: str, state: State, *, ended: bool) -> None:
        """Remove all records; also what became of it, when it has no content any more. `open` goes last."""
        last = record_key(upload, "open")
        keys = [key for key in state.keys if key != last]
        for key in [*keys, *([end_key(upload)] if ended else []), last]:
            self._ids.pop(key, None)
            await self._bucket.delete(key)

    async def _get(self, key: str) -> Any:
        body = await self._read(key)
        return None if body is None else json.loads(body)

    async def _read(self, key: str) -> bytes | None:
        try:
            return await self._bucket.get(key)
        except Missing:
            return None

    def _remember(self, key: str, value: str) -> None:
        self._ids[key] = value
        if len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)


def _fill(state: State, name: str, body: bytes) -> None:
    found = json.loads(body)
    if name == "parts":
        state.parts_id = found["id"]
    elif name == "joined":
        state.joined = [Part(number, etag, size_bytes) for number, etag, size_bytes in found]
    else:
        parts = tuple((number, etag) for number, etag in found.get("parts", ()))
        state.whole = Whole(found["id"], parts, found.get("etag", ""), found.get("size_bytes", 0))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
