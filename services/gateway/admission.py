"""Whether a request may pass to a deployment that asks for an API token. Envoy asks here, headers only.

Envoy waits for the answer; the authenticator keeps answers for five seconds, so a token that is taken away works that
long at most.
"""

import contextlib
import json
import logging
from pathlib import Path
from urllib.parse import quote

from aiohttp import web
from prometheus_client import Counter

from ekiben.errors import EkibenError, PermissionDenied, Unauthenticated
from services.gateway.routes import problem
from services.kernel.identity import Authenticator, token_of
from services.kernel.sites import serve_app

log = logging.getLogger(__name__)

admissions = Counter(
    "ekiben_admissions_total", "Requests to deployments that ask for a token, by outcome.", ["outcome"]
)


class Admission:
    """Answers Envoy."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def handle(self, request: web.Request) -> web.Response:
        """200 lets the request pass; anything else is what the caller gets."""
        token = token_of(request.headers)
        if not token:
            admissions.labels("refused").inc()
            return _refusal("This deployment asks for an API token: send `Authorization: Bearer TOKEN`.")
        try:
            principal = await self._authenticator.authenticate(token)
        except (Unauthenticated, PermissionDenied):
            admissions.labels("refused").inc()
            return _refusal("The API token is unknown or has expired.")
        except EkibenError as exc:
            log.warning("tokens cannot be checked", extra={"error": str(exc)})
            admissions.labels("unavailable").inc()
            return web.Response(status=503)
        admissions.labels("admitted").inc()
        name = principal.api_token_display_name or principal.user
        return web.Response(headers={"ekiben-api-token": quote(name, safe=" /")})


def serve_admission(admission: Admission, socket: Path) -> contextlib.AbstractAsyncContextManager[str]:
    """Listen on the socket, which only the suite's user may open."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", admission.handle)
    return serve_app(app, f"unix:{socket}", setting="run_dir", shutdown_timeout=1.0)


def _refusal(detail: str) -> web.Response:
    body = json.dumps(problem(401, "Unauthenticated", "API_TOKEN_REQUIRED", detail, "UNAUTHENTICATED"))
    headers = {"content-type": "application/problem+json", "www-authenticate": "Bearer"}
    return web.Response(status=401, body=body.encode(), headers=headers)
