"""Users, API tokens and logins over gRPC."""

from google.protobuf.empty_pb2 import Empty

from ekiben import names
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1 import identity_pb2_grpc
from services.kernel import pages, updates
from services.kernel.identity import current_principal
from services.registry import accounts as use_cases
from services.registry import logins as login_cases
from services.registry.messages import identities as messages
from services.registry.messages.catalog import to_timestamp
from services.registry.servicer.context import Context


class Accounts(identity_pb2_grpc.AccountsServicer):
    """Serves ekiben.identity.v1.Accounts."""

    def __init__(self, accounts: use_cases.Accounts) -> None:
        self._accounts = accounts

    async def GetCaller(self, request: pb.GetCallerRequest, context: Context) -> pb.Principal:
        """See the proto."""
        return messages.principal(current_principal())

    async def Authenticate(self, request: pb.AuthenticateRequest, context: Context) -> pb.Principal:
        """See the proto."""
        return messages.principal(await self._accounts.authenticate(request.token))

    async def GetOrganization(self, request: pb.GetOrganizationRequest, context: Context) -> pb.Organization:
        """See the proto."""
        name = names.Organization.parse(request.name, wildcard=True)
        found = await self._accounts.get_organization(current_principal(), name.organization)
        return messages.organization(found)

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> pb.User:
        """See the proto."""
        name = names.User.parse(request.name)
        return messages.user(await self._accounts.get_user(current_principal(), name.user))

    async def ListUsers(self, request: pb.ListUsersRequest, context: Context) -> pb.ListUsersResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, str) or ("",)
        found = await self._accounts.list_users(current_principal(), size + 1, *after)
        return pb.ListUsersResponse(
            users=[messages.user(user) for user in found[:size]],
            next_page_token=pages.encode(request, found[size - 1].user) if len(found) > size else "",
        )

    async def CreateUser(self, request: pb.CreateUserRequest, context: Context) -> pb.User:
        """See the proto."""
        name = names.User.parse(request.user.name)
        values = messages.user_values(request.user)
        return messages.user(await self._accounts.create_user(current_principal(), name.user, values))

    async def UpdateUser(self, request: pb.UpdateUserRequest, context: Context) -> pb.User:
        """See the proto."""
        name = names.User.parse(request.user.name)
        fields = updates.paths(request.user, request.update_mask, messages.USER_WRITABLE)
        values = messages.user_values(request.user, fields)
        updated = await self._accounts.update_user(current_principal(), name.user, values, request.user.etag)
        return messages.user(updated)

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.User.parse(request.name)
        await self._accounts.delete_user(current_principal(), name.user, request.etag)
        return Empty()

    async def GetApiToken(self, request: pb.GetApiTokenRequest, context: Context) -> pb.ApiToken:
        """See the proto."""
        name = names.ApiToken.parse(request.name)
        return messages.api_token(await self._accounts.get_token(current_principal(), name.api_token))

    async def ListApiTokens(self, request: pb.ListApiTokensRequest, context: Context) -> pb.ListApiTokensResponse:
        """See the proto."""
        size, before = pages.page_size(request.page_size), pages.decode(request, int) or (None,)
        found, total = await self._accounts.list_tokens(current_principal(), request.filter, size + 1, *before)
        return pb.ListApiTokensResponse(
            api_tokens=[messages.api_token(token) for _, token in found[:size]],
            next_page_token=pages.encode(request, found[size - 1][0]) if len(found) > size else "",
            total_size=total,
        )

    async def CreateApiToken(self, request: pb.CreateApiTokenRequest, context: Context) -> pb.ApiToken:
        """See the proto."""
        draft = messages.token_draft(request.api_token)
        token, value = await self._accounts.create_token(current_principal(), draft)
        return messages.api_token(token, value)

    async def DeleteApiToken(self, request: pb.DeleteApiTokenRequest, context: Context) -> Empty:
        """See the proto."""
        await self._accounts.delete_token(current_principal(), names.ApiToken.parse(request.name).api_token)
        return Empty()


class Logins(identity_pb2_grpc.LoginsServicer):
    """Serves ekiben.identity.v1.Logins."""

    def __init__(self, logins: login_cases.Logins) -> None:
        self._logins = logins

    async def CreateLogin(self, request: pb.CreateLoginRequest, context: Context) -> pb.Login:
        """See the proto."""
        code, expire_time = await self._logins.create(current_principal())
        return pb.Login(code=code, expire_time=to_timestamp(expire_time))

    async def ApproveLogin(self, request: pb.ApproveLoginRequest, context: Context) -> pb.Login:
        """See the proto."""
        expire_time = await self._logins.approve(current_principal(), request.code)
        return pb.Login(expire_time=to_timestamp(expire_time))

    async def RedeemLogin(self, request: pb.RedeemLoginRequest, context: Context) -> pb.Login:
        """See the proto."""
        return pb.Login(token=await self._logins.redeem(request.code))
