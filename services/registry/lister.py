"""The loop that lists the files of contents, and thereby reads each once more.

It works on one at a time. The rows say what is to be done, also of contents that were there before there were lists;
a wake-up only makes it sooner.
"""

import asyncio
import contextlib
import logging
import random
from datetime import timedelta
from typing import BinaryIO

from ekiben.errors import EkibenError, InvalidArgument, NotFound, Unavailable
from services.content.blobs import BlobStore
from services.content.digest import Digest
from services.content.listing import Listing
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.registry.domain import File
from services.registry.listings import BATCH, file_of
from services.registry.store import files as rows

log = logging.getLogger(__name__)

_LEASE = timedelta(minutes=1)
_RENEWED_S = 20.0
"""Who is late with that is not alone: two list the same content then, to the same end."""
_INTERVAL_S = 10.0


class Lister:
    """Lists what waits."""

    def __init__(self, database: Database, blobs: BlobStore, clock: Clock) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look now."""
        self._woken.set()

    async def run(self) -> None:
        """List for ever. What fails is logged and tried again."""
        while True:
            self._woken.clear()
            try:
                while await self.list_one():
                    pass
            except EkibenError as exc:
                log.warning("files were not listed", extra={"cause": exc.message})
            except OSError as exc:
                log.error("files were not listed", extra={"cause": str(exc)})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S * random.uniform(0.8, 1.2)):
                    await self._woken.wait()

    async def list_one(self) -> bool:
        """List one content; False where none waits."""
        async with self._database.transaction() as connection:
            now = self._clock.now()
            digest = await rows.take(connection, now, now + _LEASE)
        if digest is None:
            return False
        failure = ""
        try:
            if (found := await self._list(digest)) != digest:
                failure = f"its bytes have the digest {found}, not {digest}."
        except NotFound:
            failure = "its bytes are missing."
        except InvalidArgument as exc:
            failure = exc.message
        if failure:
            log.error("content is damaged", extra={"digest": digest, "cause": failure})
        async with self._database.transaction() as connection:
            await rows.end(connection, digest, failure)
        return True

    async def _list(self, digest: str) -> str:
        loop = asyncio.get_running_loop()
        ended = False
        found = ""

        def keep(first: int, files: list[File]) -> None:
            if ended:
                raise Unavailable("The registry stops.", reason="SERVER_STOPPING")
            asyncio.run_coroutine_threadsafe(self._keep(digest, first, files), loop).result()

        def work(archive: BinaryIO) -> None:
            nonlocal found
            listing, count, batch = Listing(archive), 0, list[File]()
            for file in listing:
                batch.append(file_of(file))
                if len(batch) == BATCH:
                    keep(count, batch)
                    count, batch = count + BATCH, []
            if batch:
                keep(count, batch)
            found = str(listing.digest)

        renewing = asyncio.ensure_future(self._renew(digest))
        try:
            await self._blobs.inspect(Digest.parse(digest), work)
        finally:
            ended = True
            renewing.cancel()
        return found

    async def _renew(self, digest: str) -> None:
        while True:
            await asyncio.sleep(_RENEWED_S)
            async with self._database.transaction() as connection:
                await rows.renew(connection, digest, self._clock.now() + _LEASE)

    async def _keep(self, digest: str, first: int, files: list[File]) -> None:
        async with self._database.transaction() as connection:
            await rows.add(connection, digest, first, files)
