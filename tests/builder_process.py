"""A builder in a process of its own that ends itself with SIGKILL once it comes to a named step, the first time only.

    python -m tests.builder_process SETTINGS.json

The JSON holds: `builder` and `peers` (fields of their settings), `listen`, `service_token_file`, `step`, `once` (a file
that is made at the kill; while it is there nobody is killed). A step is one of the builder's failpoints, or `write N`: when
the first bytes of the Nth blob of an image have been written.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from services.builder.app import open_builder
from services.builder.settings import Settings
from services.content.digest import Digest
from services.content.images import Descriptor
from services.content.images.layout import LayoutImageStore
from services.kernel.app import serve
from services.kernel.peers import open_peers
from services.kernel.settings import PeerSettings, ServerSettings


async def main(given: dict[str, object]) -> None:
    """Serve until killed or told to stop."""
    fields = {key: Path(str(value)) if key.endswith("_dir") else value for key, value in dict(given["builder"]).items()}  # type: ignore[call-overload]
    settings = Settings(**fields)
    token_file = Path(str(given["service_token_file"]))
    once = Path(str(given["once"]))

    async def failpoint(step: str) -> None:
        if step == given["step"] and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    written = itertools.count(1)
    write = LayoutImageStore.write

    async def write_and_die(
        self: LayoutImageStore, chunks: AsyncIterable[bytes], expected: Descriptor | None = None
    ) -> tuple[Digest, int]:
        step = f"write {next(written)}"

        async def passed() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                yield chunk
                await failpoint(step)

        return await write(self, passed(), expected)

    LayoutImageStore.write = write_and_die  # type: ignore[method-assign]

    peer_settings = PeerSettings(service_token_file=token_file, **given["peers"])  # type: ignore[arg-type]
    async with open_peers(peer_settings, caller="builder") as peers:
        server = ServerSettings(listen=str(given["listen"]), service_token_file=token_file, grace_s=1)
        await serve([open_builder(settings, peers, failpoint=failpoint)], server, peers=peers)


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
