"""The files of a model's or a bento's content: listed, and read one by one."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc.aio

from ekiben import pages
from ekiben.errors import Unavailable
from ekiben.registry.v1 import files_pb2 as pb
from ekiben.registry.v1.files_pb2_grpc import FilesStub
from ekiben.transfer import Transfer, Write

T = TypeVar("T")

_PATIENCE_S = 600.0
"""The registry hashes a content to list its files: of 500 GB in ten minutes."""


class Files:
    """The files of versions, which are named as resources: `modelRepositories/iris/models/v1`."""

    def __init__(self, channel: grpc.aio.Channel, transfer: Transfer) -> None:
        self._stub, self._transfer = FilesStub(channel), transfer

    async def list(self, parent: str, *, limit: int = 0) -> AsyncIterator[pb.File]:
        """The files of a version, in the order of its archive; right after a push, once they are listed."""
        await _when_listed(lambda: self._stub.ListFiles(pb.ListFilesRequest(parent=parent, page_size=1)))
        async for file in pages.items(self._stub.ListFiles, pb.ListFilesRequest(parent=parent), "files", limit=limit):
            yield file

    async def sign(self, parent: str, path: str) -> pb.SignedFile:
        """Where one file can be read by itself, without any other credential."""
        return await _when_listed(lambda: self._stub.SignFile(pb.SignFileRequest(parent=parent, path=path)))

    async def read(self, parent: str, path: str, write: Write) -> pb.File:
        """Read one file and nothing else of the content; `write` gets its bytes piece by piece, in another thread.

        Raises:
            NotFound: there is no such file (FILE_NOT_FOUND).
            FailedPrecondition: the archive is compressed (FILE_COMPRESSED).
            DataLoss: what was written has not the file's digest (DIGEST_MISMATCH): do not use it.
        """
        signed = await self.sign(parent, path)
        await self._transfer.read_file(signed, lambda: self.sign(parent, path), write)
        return signed.file


async def _when_listed(call: Callable[[], Awaitable[T]]) -> T:
    pause_s, begun = 0.1, time.monotonic()
    while True:
        try:
            return await call()
        except Unavailable as error:
            if error.reason != "FILES_NOT_LISTED" or time.monotonic() - begun > _PATIENCE_S:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 2.0)
