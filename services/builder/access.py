"""Who may pull images: whoever has an API token, or one to pull with (`pull_tokens.py`), as the password of Basic with
any user name, or as Bearer.

Basic is what container engines keep after a login and send each time. A request without credentials is how they
begin, and refused without a word in the audit log; one whose credentials do not work is written down.
"""

import base64
import binascii

from aiohttp import web

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import EkibenError, PermissionDenied, Unauthenticated
from services.builder.pull_tokens import PREFIX, PullTokens
from services.kernel import telemetry
from services.kernel.audit import Writer
from services.kernel.identity import AuditRecord, Authenticator, Principal, role_name, token_of

PULL, PUSH = "oci.distribution/Pull", "oci.distribution/Push"
"""Methods of audit entries: reading, and writing, which nobody may."""


class Access:
    """Knows callers by their token."""

    def __init__(self, authenticator: Authenticator, audit: Writer, tokens: PullTokens) -> None:
        self._authenticator = authenticator
        self._tokens = tokens
        self._audit = audit

    async def admit(self, request: web.Request) -> Principal:
        """Who sent the request.

        Raises:
            Unauthenticated: no token (TOKEN_MISSING), or one that does not work.
            PermissionDenied: the role is less than viewer (ROLE_TOO_LOW).
            Unavailable: nobody can say now.
        """
        token = _token(request)
        if not token:
            raise Unauthenticated(
                "Pulling images needs an API token: log in with any user name and the token as password.",
                reason="TOKEN_MISSING",
            )
        principal = None
        try:
            if token.startswith(PREFIX):
                return self._tokens.known(token)
            principal = await self._authenticator.authenticate(token)
            if principal.role < Role.ROLE_VIEWER:
                raise PermissionDenied(
                    f"Pulling images needs ROLE_VIEWER; {principal.user} has {role_name(principal.role)}.",
                    reason="ROLE_TOO_LOW",
                )
        except (Unauthenticated, PermissionDenied) as exc:
            await self._audit.now(self._entry(request, principal, exc))
            raise
        return principal

    def _entry(self, request: web.Request, principal: Principal | None, error: EkibenError) -> AuditRecord:
        return AuditRecord(
            time=self._audit.now_utc(),
            user=principal.user if principal else "",
            organization=principal.organization if principal else "",
            api_token=principal.api_token if principal else "",
            method=PULL if request.method in ("GET", "HEAD") else PUSH,
            resource=request.path[:500],
            outcome=error.code_name,
            detail=f"{error.reason}: {error.message}",
            request_id=request.headers.get("X-Request-Id", ""),
            trace_id=telemetry.current_trace_id(),
            peer=peer(request),
        )


def peer(request: web.Request) -> str:
    """Address of the client, as the gateway saw it."""
    return request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() or request.remote or "unknown"


def _token(request: web.Request) -> str:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return token_of({"authorization": request.headers.get("Authorization", "")})
    try:
        _, _, password = base64.b64decode(given.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "?"
    return token_of({"authorization": f"Bearer {password}"})
