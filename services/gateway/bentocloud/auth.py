"""Who the caller is, and the login through a browser."""

from ekiben.identity.v1 import identity_pb2 as identity
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.wire import Reply, last, resource


async def current(call: Call) -> Reply:
    """GET /api/v1/auth/current: the caller as a user."""
    principal = await call(call.api.accounts.GetCaller, identity.GetCallerRequest())
    return await call.user(principal.user)


async def current_organization(call: Call) -> Reply:
    """GET /api/v1/current_org."""
    request = identity.GetOrganizationRequest(name="organizations/-")
    return organization_reply(await call(call.api.accounts.GetOrganization, request))


async def code(call: Call) -> Reply:
    """GET /api/v1/auth/code: a code that somebody approves in a browser at `/api_tokens?code=…`."""
    login = await call(call.api.logins.CreateLogin, identity.CreateLoginRequest())
    return {"code": login.code}


async def token(call: Call) -> Reply:
    """GET /api/v1/auth/token: the token of an approved code. Any error means "not yet" to the client."""
    login = await call(call.api.logins.RedeemLogin, identity.RedeemLoginRequest(code=call.query("code")))
    return {"token": login.token}


def organization_reply(organization: identity.Organization) -> Reply:
    """An organization."""
    base = resource("organization", last(organization.name), organization.uid, created=organization.create_time)
    return {**base, "description": organization.description}
