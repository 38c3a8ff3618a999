"""A client in a process of its own, to be killed: `python -m tests.client_process push|pull ADDRESS URL TOKEN PATH`.

Everything is at the size of a test: parts of 16 KiB, ranges of 8 KiB.
"""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from ekiben import ranges, receiving, uploading
from ekiben.client import Client
from ekiben.endpoints import Endpoint

NAME = "modelRepositories/iris/models/v1"
PART_BYTES, RANGE_BYTES = 1 << 14, 1 << 13


@dataclass(frozen=True)
class Elsewhere(Endpoint):
    """A registry on another machine, whose bytes pass through a proxy."""

    bytes_url: str = ""

    @property
    def loopback(self) -> bool:
        """False: it is elsewhere."""
        return False

    def resolve(self, url: str) -> str:
        """The path at the proxy; a URL that is whole stays."""
        return url if "://" in url else self.bytes_url + url


async def main(verb: str, address: str, url: str, token: str, path: str) -> None:
    """Push the folder, going on with what was begun; or pull to it."""
    uploading.PART_BYTES, uploading.HASH_FIRST_BYTES = PART_BYTES, 1 << 10
    ranges.RANGE_BYTES = receiving.CHUNK_BYTES = RANGE_BYTES
    async with Client(Elsewhere(address, tls=False, bytes_url=url), token) as client:
        if verb == "push":
            await client.models.push(Path(path), resume=True)
        else:
            await client.models.pull(NAME, Path(path))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
