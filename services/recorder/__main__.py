"""`python -m services.recorder`: the recorder as a process."""

import asyncio

from services.kernel.app import serve
from services.kernel.peers import open_peers
from services.kernel.settings import PeerSettings, ServerSettings, load
from services.recorder.app import open_recorder
from services.recorder.settings import Settings


async def main() -> None:
    """Serve until told to stop."""
    settings, server = load(Settings, "EKIBEN_RECORDER"), load(ServerSettings, "EKIBEN_SERVER")
    async with open_peers(load(PeerSettings, "EKIBEN_PEERS"), caller="recorder") as peers:
        await serve([open_recorder(settings, peers)], server)


asyncio.run(main())
