"""API tokens."""

from datetime import UTC, datetime

from ekiben import names
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.identity.v1 import identity_pb2 as identity
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.auth import organization_reply
from services.gateway.bentocloud.wire import (
    Reply,
    last,
    member,
    number,
    page,
    read_time,
    required,
    resource,
    time_or_none,
)

_READ_ONLY_SCOPES = {"read_organization", "read_cluster"}


async def list_all(call: Call) -> Reply:
    """GET /api/v1/api_tokens."""
    query = call.request.rel_url.query
    start, count = number(query, "start", 0), number(query, "count", 0)
    words = " ".join(filter(None, (call.query("q"), call.query("search"))))
    listing = identity.ListApiTokensRequest(filter=words)
    found = [token async for token in call.pages(call.api.accounts.ListApiTokens, listing, "api_tokens")]
    organization = await _organization(call)
    items = [await _reply(call, token, organization) for token in found[start : start + count if count else None]]
    return page(items, start=start, total=len(found))


async def create(call: Call) -> Reply:
    """POST /api/v1/api_tokens: the only reply that holds the token itself.

    The scopes are kept as they are; where they only read, the token is a viewer's. `expired_at` comes without a
    zone and in the client's own, which we cannot know: this machine's is the best guess.
    """
    body = await call.body()
    scopes = [str(scope) for scope in member(body, "scopes", list, [])]
    token = identity.ApiToken(
        display_name=required(body, "name"),
        description=member(body, "description", str, ""),
        scopes=scopes,
        role=role_of(scopes),
    )
    if expired_at := member(body, "expired_at", str, ""):
        token.expire_time.CopyFrom(read_time(expired_at, local=True))
    created = await call(call.api.accounts.CreateApiToken, identity.CreateApiTokenRequest(api_token=token))
    return await _reply(call, created, await _organization(call))


async def get(call: Call) -> Reply:
    """GET /api/v1/api_tokens/{uid}."""
    found = await call(call.api.accounts.GetApiToken, identity.GetApiTokenRequest(name=_name(call)))
    return await _reply(call, found, await _organization(call))


async def delete(call: Call) -> Reply:
    """DELETE /api/v1/api_tokens/{uid}."""
    await call(call.api.accounts.DeleteApiToken, identity.DeleteApiTokenRequest(name=_name(call)))
    return {}


def role_of(scopes: list[str]) -> Role.ValueType:
    """The role for BentoML's scopes: a viewer's where all of them only read, else whatever the user's is."""
    return Role.ROLE_VIEWER if scopes and set(scopes) <= _READ_ONLY_SCOPES else Role.ROLE_UNSPECIFIED


def token_reply(token: identity.ApiToken, user: Reply, organization: Reply, now: datetime) -> Reply:
    """An API token. Clients call it by its uid, which is therefore the id of its resource name."""
    expires = token.HasField("expire_time")
    return {
        **resource("api_token", token.display_name, last(token.name), created=token.create_time),
        "description": token.description,
        "scopes": list(token.scopes),
        "user": user,
        "organization": organization,
        "expired_at": time_or_none(token.expire_time),
        "last_used_at": time_or_none(token.last_use_time),
        "is_expired": expires and token.expire_time.ToDatetime(UTC) <= now,
        "is_api_token": True,
        "is_organization_token": False,
        "is_global_access": False,
        "token": token.token or None,
    }


async def _reply(call: Call, token: identity.ApiToken, organization: Reply) -> Reply:
    return token_reply(token, await call.user(token.user), organization, datetime.now(UTC))


async def _organization(call: Call) -> Reply:
    request = identity.GetOrganizationRequest(name="organizations/-")
    return organization_reply(await call(call.api.accounts.GetOrganization, request))


def _name(call: Call) -> str:
    return str(names.ApiToken(call.path("token")))
