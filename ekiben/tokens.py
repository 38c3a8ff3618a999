"""API tokens: credentials of users."""

from collections.abc import AsyncIterator

import grpc.aio

from ekiben import pages
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1.identity_pb2_grpc import AccountsStub


class Tokens:
    """API tokens. Only a hash is kept by the server: the value is in the answer to `create` alone."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = AccountsStub(channel)

    async def get(self, name: str) -> pb.ApiToken:
        """One token, without its value."""
        return await self._stub.GetApiToken(pb.GetApiTokenRequest(name=name))

    def list(self, *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.ApiToken]:
        """Tokens, newest first: all for an admin, else the caller's own."""
        request = pb.ListApiTokensRequest(filter=filter)
        return pages.items(self._stub.ListApiTokens, request, "api_tokens", limit=limit)

    async def create(self, token: pb.ApiToken) -> pb.ApiToken:
        """Create a token; keep `token` of the answer, it is not shown again."""
        return await self._stub.CreateApiToken(pb.CreateApiTokenRequest(api_token=token))

    async def delete(self, name: str) -> None:
        """Delete a token; it stops working within five seconds everywhere."""
        await self._stub.DeleteApiToken(pb.DeleteApiTokenRequest(name=name))
