"""What every handler of the wire protocol uses: the peers' stubs, and one request with its caller."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web
from google.protobuf.message import Message
from grpc import aio

from ekiben.builder.v1.builder_pb2_grpc import BuildsStub
from ekiben.deployer.v1.deployer_pb2_grpc import DeploymentsStub, InstanceTypesStub
from ekiben.errors import NotFound, ResourceExhausted
from ekiben.identity.v1 import identity_pb2 as identity
from ekiben.identity.v1.identity_pb2_grpc import AccountsStub, LoginsStub, SecretsStub
from ekiben.registry.v1.registry_pb2_grpc import BentosStub, ModelsStub, UploadsStub
from services.gateway.bentocloud.wire import Reply, read_object
from services.gateway.responses import call_metadata, public_url
from services.kernel.peers import Peers

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)

# Enough for few round trips, little enough that a page of long manifests stays below a message's size limit.
PAGE_SIZE = 50


class Api:
    """The peers as stubs, and what settings say of uploads."""

    def __init__(self, peers: Peers, *, blobs: str, upload_strategy: str = "auto") -> None:
        self.models = ModelsStub(peers.registry)
        self.bentos = BentosStub(peers.registry)
        self.uploads = UploadsStub(peers.registry)
        self.accounts = AccountsStub(peers.registry)
        self.logins = LoginsStub(peers.registry)
        self.secrets = SecretsStub(peers.registry)
        self.builds = BuildsStub(peers.builder)
        self.deployments = DeploymentsStub(peers.deployer)
        self.instance_types = InstanceTypesStub(peers.deployer)
        self.blobs = blobs
        self.upload_strategy = upload_strategy


@dataclass
class Call:
    """One request of a client."""

    api: Api
    request: web.Request
    _users: dict[str, Reply] = field(default_factory=dict)

    async def __call__(
        self, method: aio.UnaryUnaryMultiCallable[Req, Res], message: Req, *, timeout_s: float | None = None
    ) -> Res:
        """Call a peer in the caller's name, within the channel's time or another."""
        return await method(message, metadata=call_metadata(self.request), timeout=timeout_s)

    def stream(self, method: aio.UnaryStreamMultiCallable[Req, Res], message: Req) -> aio.UnaryStreamCall[Req, Res]:
        """Open a stream in the caller's name; whoever opens it cancels it."""
        return method(message, metadata=call_metadata(self.request))

    async def pages(self, method: Any, message: Any, field_name: str) -> AsyncIterator[Any]:
        """Every item of a list, page after page."""
        message.page_size = message.page_size or PAGE_SIZE
        while True:
            try:
                reply = await self(method, message)
            except ResourceExhausted:
                if message.page_size == 1:
                    raise
                message.page_size = max(1, message.page_size // 8)  # long manifests made the page too big a message
                continue
            for item in getattr(reply, field_name):
                yield item
            if not reply.next_page_token:
                return
            message.page_token = reply.next_page_token

    async def body(self) -> dict[str, Any]:
        """The request's JSON object."""
        return read_object(await self.request.read())

    def path(self, name: str) -> str:
        """A variable of the request's path."""
        return self.request.match_info[name]

    def query(self, name: str) -> str:
        """A query parameter; the empty string where it is absent, for clients send None as that."""
        return self.request.rel_url.query.get(name, "")

    @property
    def public_url(self) -> str:
        """Where this client reaches the platform, without a slash at the end."""
        return public_url(self.request)

    async def user(self, name: str) -> Reply:
        """The user reply for `users/{user}`; somebody deleted, or a service, has only a name."""
        if name not in self._users:
            found = identity.User(name=name)
            if name.startswith("users/"):
                with suppress(NotFound):
                    found = await self(self.api.accounts.GetUser, identity.GetUserRequest(name=name))
            self._users[name] = user_reply(found)
        return self._users[name]


Handler = Callable[[Call], Awaitable[Reply | list[Reply] | web.StreamResponse]]


def user_reply(user: identity.User) -> Reply:
    """A user; each member is a string. Who has no e-mail address is called by name: a login prints that as well."""
    name = user.name.rsplit("/", 1)[-1]
    return {
        "name": name,
        "email": user.email or name,
        "first_name": user.first_name,
        "last_name": user.last_name,
    }
