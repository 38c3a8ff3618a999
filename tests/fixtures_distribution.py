"""Images served over HTTP, and who asks: for tests of what container engines see."""

import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from yarl import URL

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import Unauthenticated, Unavailable
from services.builder.access import Access
from services.builder.distribution import Distribution, listen
from services.builder.pull_tokens import PullTokens
from services.builder.shelves import Shelf
from services.content.digest import Digest
from services.kernel.audit import Writer
from services.kernel.clock import ManualClock
from services.kernel.identity import AuditRecord, Principal

ABSENT = "sha256:" + "0" * 64


@dataclass
class Tokens:
    """An authenticator and an auditor that know what they are told."""

    principals: dict[str, Principal] = field(default_factory=dict)
    away: bool = False
    written: list[AuditRecord] = field(default_factory=list)

    async def authenticate(self, token: str) -> Principal:
        if self.away:
            raise Unavailable("The registry is away.", reason="UNAVAILABLE")
        if token not in self.principals:
            raise Unauthenticated("The token is not known here.", reason="TOKEN_INVALID")
        return self.principals[token]

    async def record(self, entry: AuditRecord) -> None:
        self.written.append(entry)


@dataclass
class Served:
    """Served images, and who asks."""

    layout: Path
    tokens: Tokens
    session: aiohttp.ClientSession
    url: str
    pulled: list[tuple[str, Digest]]
    """Repository and digest of each manifest that was given."""
    clock: ManualClock
    pull_tokens: PullTokens

    async def __call__(
        self, path: str, method: str = "GET", token: str = "viewer", **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()
        async with self.session.request(method, URL(f"{self.url}{path}", encoded=True), headers=sent) as response:
            return response.status, response.headers, await response.read()

    async def code(self, path: str, status: int, method: str = "GET", token: str = "viewer") -> str:
        """The specification's code of an error with this status."""
        found, headers, body = await self(path, method, token)
        assert found == status, (found, body)
        assert headers["Content-Type"].startswith("application/json")
        (error,) = json.loads(body)["errors"]
        assert error["message"]
        return str(error["code"])


@contextlib.asynccontextmanager
async def serving(shelf: Shelf, layout: Path) -> AsyncIterator[Served]:
    """Serve a shelf on loopback while inside; `layout` is for the test to write to."""
    tokens = Tokens(
        {
            "viewer": Principal("users/ada", "organizations/default", Role.ROLE_VIEWER, "apiTokens/1"),
            "stranger": Principal("users/eve", "organizations/other", Role.ROLE_ADMIN, "apiTokens/2"),
            "nobody": Principal("users/nil", "organizations/default", Role.ROLE_ANYONE, "apiTokens/3"),
        }
    )
    pulled: list[tuple[str, Digest]] = []
    clock = ManualClock()
    pull_tokens = PullTokens("eks_suite", clock)
    async with listen(
        Distribution(shelf, Access(tokens, Writer(tokens), pull_tokens), lambda *each: pulled.append(each)).app(),
        "127.0.0.1:0",
    ) as address:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield Served(layout, tokens, session, f"http://{address}", pulled, clock, pull_tokens)
