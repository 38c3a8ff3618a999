"""A blob on its way into a registry.

One request while all goes well: a PUT of everything where the digest is known before, else a PATCH of everything and a
PUT that names the digest. When that breaks off, the registry is asked how much it has, and the rest follows in pieces,
each of which it confirms. A session that the registry has forgotten is begun anew, and so is one that has other bytes
than the source gives when it is read again: only at the end of a pass does a source know that its bytes were right.

Source: OCI distribution-spec 1.1, "Pushing Blobs".
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from typing import Any

from yarl import URL

from ekiben.errors import EkibenError
from services.content.digest import Digest
from services.content.images import Descriptor
from services.content.images.registry.client import Client, Patience, Refused
from services.content.images.registry.passes import Content, Differs
from services.content.images.registry.problems import Broken, number
from services.content.images.resolving import unexpected

_PIECE_BYTES = 8 << 20
_MAX_PIECE_BYTES = 64 << 20
"""However large a registry wants them: a piece is held in memory."""
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})")
_GONE = (404, 416)
_OCTETS = {"Content-Type": "application/octet-stream"}


class Upload:
    """One blob. Use it once."""

    def __init__(self, client: Client, chunks: AsyncIterable[bytes], expected: Descriptor | None) -> None:
        self._client = client
        self._content = Content(chunks, expected)
        self._expected = expected
        self._scopes = client.scopes("pull,push")
        self._what = f"take blob {str(expected.digest)[:19]}" if expected else "take a blob"
        self._place: URL | None = None
        """Where the session goes on; the registry gives another with each answer."""
        self._piece_bytes = _PIECE_BYTES
        self._resumed = False
        self._out_of_step = False

    async def run(self) -> tuple[Digest, int]:
        """Send it; its digest and size. See ImageStore.write."""
        patience, reached = Patience(self._client.options), 0
        while True:
            try:
                if self._place is None:
                    await self._begin()
                    await self._send_all()
                else:
                    self._resumed, offset = True, await self._where()
                    if offset > reached:
                        reached = offset
                        patience.progress()
                    await self._send_rest(offset)
                await self._finish()
                if self._expected is not None:  # a registry that has it already need not take all of it
                    return self._expected.digest, self._expected.size_bytes
                return self._content.digest, self._content.size_bytes
            except Broken as exc:
                await self._again_after(exc, patience)
            except Refused as exc:
                await self._again_after(self._as_broken(exc), patience)
            except EkibenError:
                await self._forget()
                raise
            if (there := await self._is_there()) is not None:
                return there

    def _as_broken(self, refused: Refused) -> Broken:
        """A refusal that only concerns how far the upload is; any other is raised as the error that it is."""
        answer = refused.answer
        if answer.status == 416 and self._place is not None and not self._out_of_step:
            self._out_of_step = True  # the end of what was cut may have arrived after it was asked: ask again
        elif (answer.status in _GONE and self._place is not None) or (
            self._resumed and "DIGEST_INVALID" in answer.codes
        ):
            self._place, self._resumed, self._out_of_step = None, False, False
        elif "DIGEST_INVALID" in answer.codes:
            known = self._expected or Descriptor("", self._content.digest, self._content.size_bytes)
            raise unexpected(known, self._content.digest) from refused
        else:
            raise refused.error from None
        return answer.transient()

    async def _again_after(self, broken: Broken, patience: Patience) -> None:
        """Wait until it may be tried again; raises where that is of no use."""
        host = self._client.location.host
        if isinstance(broken, Differs):
            await self._forget()
            self._place, self._resumed, self._out_of_step = None, False, False
        if (problem := self._content.problem) is not None:
            await self._forget()
            raise problem from None
        if self._content.begun and not self._content.again:
            await self._forget()
            raise broken.error(host, self._what) from broken
        await patience.wait(broken, host, self._what)

    async def _begin(self) -> None:
        url = await self._client.url("blobs/uploads/")
        response = await self._client.once("POST", url, self._what, (202,), self._scopes, body=b"")
        self._content.forget()
        async with response:
            await self._follow(response.headers, url)
            least = number(response.headers.get("OCI-Chunk-Min-Length", "")) or 0
            self._piece_bytes = max(_PIECE_BYTES, min(least, _MAX_PIECE_BYTES))

    async def _send_all(self) -> None:
        assert self._place is not None
        place, options = self._place, self._client.options
        request: dict[str, Any] = {"timeout_s": options.answer_s, "headers": _OCTETS}
        async with self._moving(self._content.since(0)) as body:
            if self._expected is None:
                response = await self._client.once(
                    "PATCH", place, self._what, (202,), self._scopes, body=body, **request
                )
            else:
                place = place.update_query(digest=str(self._expected.digest))
                request["headers"] = {**_OCTETS, "Content-Length": str(self._expected.size_bytes)}
                response = await self._client.once("PUT", place, self._what, (201,), self._scopes, body=body, **request)
        async with response:
            if self._expected is None:
                await self._follow(response.headers, place)
                if not self._content.whole:
                    raise Broken("it answers before it has everything")
            else:
                self._place = None

    async def _send_rest(self, offset: int) -> None:
        """In pieces that are held in memory, each confirmed before the next."""
        waiting = bytearray()
        async with contextlib.aclosing(self._content.since(offset)) as chunks:
            async for chunk in chunks:
                waiting += chunk
                while len(waiting) >= self._piece_bytes:
                    await self._send_piece(bytes(memoryview(waiting)[: self._piece_bytes]), offset)
                    offset += self._piece_bytes
                    del waiting[: self._piece_bytes]
        if waiting:
            await self._send_piece(bytes(waiting), offset)

    async def _send_piece(self, piece: bytes, offset: int) -> None:
        assert self._place is not None
        place = self._place
        headers = {**_OCTETS, "Content-Range": f"{offset}-{offset + len(piece) - 1}"}
        response = await self._client.once(
            "PATCH", place, self._what, (202,), self._scopes, headers=headers, body=piece
        )
        async with response:
            await self._follow(response.headers, place)
        self._out_of_step = False

    async def _finish(self) -> None:
        if self._place is None:
            return
        url = self._place.update_query(digest=str(self._content.digest))
        response = await self._client.once(
            "PUT", url, self._what, (201,), self._scopes, body=b"", timeout_s=self._client.options.answer_s
        )
        response.release()

    async def _where(self) -> int:
        """How many bytes the registry has."""
        assert self._place is not None
        try:
            response = await self._client.once("GET", self._place, self._what, (204,), self._scopes)
        except Refused as exc:
            if exc.answer.status in (401, 403):
                raise
            self._place = None  # forgotten, or a registry that cannot tell: from the beginning
            raise exc.answer.transient() from exc
        async with response:
            await self._follow(response.headers, self._place)
            match = _RANGE.fullmatch(response.headers.get("Range", ""))
        last = int(match[1]) if match else 0
        return last + 1 if last else 0

    async def _is_there(self) -> tuple[Digest, int] | None:
        """Whether the registry has it by now: an answer that was lost may have been good."""
        known = self._expected
        if known is None and self._content.whole:
            known = Descriptor("", self._content.digest, self._content.size_bytes)
        if known is None:
            return None
        try:
            url = await self._client.url(f"blobs/{known.digest}")
            (await self._client.once("HEAD", url, self._what, (200,), self._scopes)).release()
        except (Broken, Refused):
            return None
        return known.digest, known.size_bytes

    async def _forget(self) -> None:
        """Tell the registry that nothing more will come; if that fails, it finds out by itself, days later."""
        if self._place is not None:
            with contextlib.suppress(Broken, Refused, EkibenError):
                (await self._client.once("DELETE", self._place, self._what, (202, 204), self._scopes)).release()

    async def _follow(self, headers: Mapping[str, str], current: URL) -> None:
        if not headers.get("Location"):
            raise Broken("it does not say where the upload goes on")
        self._place = await self._client.beside(headers["Location"], current)

    @contextlib.asynccontextmanager
    async def _moving(self, chunks: AsyncGenerator[bytes, None]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The chunks as a request's body; Broken when the registry takes none of them for too long.

        Whoever leaves has closed the source: the next pass would meet it in its middle.
        """
        options, loop = self._client.options, asyncio.get_running_loop()
        inside = True
        step: asyncio.Task[bytes] | None = None

        async def one() -> bytes:
            return await anext(chunks, b"")

        async def body() -> AsyncIterator[bytes]:
            nonlocal step
            while inside:
                deadline.reschedule(None)  # how long the source takes is its own affair
                step = asyncio.ensure_future(one())
                chunk = await step
                if inside:
                    deadline.reschedule(loop.time() + (options.stall_s if chunk else options.answer_s))
                if not chunk:
                    return
                yield chunk

        try:
            async with asyncio.timeout(options.stall_s) as deadline:
                yield body()
        except TimeoutError as exc:
            if not deadline.expired():
                raise
            raise Broken("it takes no more bytes") from exc
        finally:
            inside = False
            if step is not None and not step.done():  # its request is given up, or answered already
                if not step.cancelling():  # else it is closing already
                    step.cancel()
                await asyncio.wait([step])
            if step is not None and not step.cancelled():
                step.exception()  # it is the request's error
            await chunks.aclose()
