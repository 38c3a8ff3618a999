"""A server of the kernel in the test's own loop: the real chain around servicers that a test writes."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import Unauthenticated
from services.kernel.app import Component, serve
from services.kernel.identity import AuditRecord, Principal
from services.kernel.settings import PeerSettings, ServerSettings

SERVICE_TOKEN = "eks_for-tests"
ORGANIZATION = "organizations/default"


class Tokens:
    """An authenticator of three people; counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.known = {
            f"ekb_{name}": Principal(f"users/{name}", ORGANIZATION, role, f"apiTokens/{name}", name)
            for name, role in (("viewer", Role.ROLE_VIEWER), ("dev", Role.ROLE_DEVELOPER), ("admin", Role.ROLE_ADMIN))
        }

    async def authenticate(self, token: str) -> Principal:
        """See Authenticator."""
        self.asked += 1
        if token not in self.known:
            raise Unauthenticated("The token is not known.", reason="TOKEN_INVALID")
        return self.known[token]


class Entries:
    """An auditor that keeps entries in a list."""

    def __init__(self) -> None:
        self.entries: list[AuditRecord] = []

    async def record(self, entry: AuditRecord) -> None:
        """See Auditor."""
        self.entries.append(entry)


@dataclass
class Running:
    """A server that runs, and what stops it."""

    address: str
    settings: ServerSettings
    stop: asyncio.Event
    tokens: Tokens = field(default_factory=Tokens)
    audit: Entries = field(default_factory=Entries)
    task: "asyncio.Task[None] | None" = None

    @property
    def peers(self) -> PeerSettings:
        """Settings of a peer that dials this server for everything."""
        address = self.address
        return PeerSettings(
            service_token_file=self.settings.service_token_file,
            registry=address,
            builder=address,
            deployer=address,
            recorder=address,
        )


@asynccontextmanager
async def opened(component: Component) -> AsyncIterator[Component]:
    """`component` as `serve` wants it."""
    yield component


@asynccontextmanager
async def run_server(folder: Path, *components: Component, **options: Any) -> AsyncIterator[Running]:
    """Serve `components` below `folder` until the end of the block; fields of ServerSettings may be given."""
    token_file = folder / "service-token"
    token_file.write_text(SERVICE_TOKEN)
    given: dict[str, Any] = {"listen": f"unix:{folder}/s.sock", "grace_s": 2.0, "log_level": "DEBUG"}
    serve_options = {key: options.pop(key) for key in ("peers", "clock") if key in options}
    own = not serve_options.get("peers")
    settings = ServerSettings(service_token_file=token_file, **(given | options))
    running = Running("", settings, asyncio.Event())
    up = asyncio.Event()

    async def started() -> None:
        up.set()

    def listening(address: str) -> None:
        running.address = address

    contexts: Sequence[contextlib.AbstractAsyncContextManager[Component]] = [opened(c) for c in components]
    task = asyncio.create_task(
        serve(
            contexts,
            settings,
            started=started,
            listening=listening,
            stop=running.stop,
            authenticator=running.tokens if own else None,
            auditor=running.audit if own else None,
            **serve_options,
        )
    )
    running.task = task
    waiting = asyncio.create_task(up.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    try:
        yield running
    finally:
        running.stop.set()
        await task


async def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll `condition`, which may be async, until it gives something true; fail with `what` after `seconds`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return result
        assert loop.time() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="ek-", dir="/tmp") as name:
        yield Path(name)
