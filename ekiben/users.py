"""Users, the organization, logins, and who the caller is."""

from collections.abc import AsyncIterator, Sequence

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import pages
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1.identity_pb2_grpc import AccountsStub, LoginsStub


class Users:
    """Users: people and programs with an account."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub, self._logins = AccountsStub(channel), LoginsStub(channel)

    async def caller(self) -> pb.Principal:
        """Who the token that is sent belongs to."""
        return await self._stub.GetCaller(pb.GetCallerRequest())

    async def organization(self) -> pb.Organization:
        """The caller's organization."""
        return await self._stub.GetOrganization(pb.GetOrganizationRequest(name="organizations/-"))

    async def get(self, name: str) -> pb.User:
        """One user."""
        return await self._stub.GetUser(pb.GetUserRequest(name=name))

    def list(self, *, limit: int = 0) -> AsyncIterator[pb.User]:
        """Users by name."""
        return pages.items(self._stub.ListUsers, pb.ListUsersRequest(), "users", limit=limit)

    async def create(self, user: pb.User) -> pb.User:
        """Create a user."""
        return await self._stub.CreateUser(pb.CreateUserRequest(user=user))

    async def update(self, user: pb.User, paths: Sequence[str] = ()) -> pb.User:
        """Change a user: the `paths`, or what is populated."""
        mask = FieldMask(paths=paths) if paths else None
        return await self._stub.UpdateUser(pb.UpdateUserRequest(user=user, update_mask=mask))

    async def delete(self, name: str, *, etag: str = "") -> None:
        """Delete a user and the user's tokens."""
        await self._stub.DeleteUser(pb.DeleteUserRequest(name=name, etag=etag))

    async def create_login(self) -> pb.Login:
        """Open a login: its code can be approved once in a browser. Needs no token."""
        return await self._logins.CreateLogin(pb.CreateLoginRequest())

    async def redeem_login(self, code: str) -> pb.Login:
        """Take the token of an approved login, once; FailedPrecondition (LOGIN_PENDING) until then."""
        return await self._logins.RedeemLogin(pb.RedeemLoginRequest(code=code))
