"""The few pages for people: the root, the API reference, approving a login, one deployment.

They are self-contained: nothing is loaded from elsewhere, and the policy that goes with each says so to the browser.
Approving a login needs a pasted API token in the very request, which a foreign page does not have: there is no
cookie that it could ride on.
"""

import html
from importlib import resources
from string import Template

from aiohttp import web

from ekiben.errors import EkibenError, NotFound
from ekiben.identity.v1 import identity_pb2 as identity
from ekiben.identity.v1.identity_pb2_grpc import LoginsStub
from services.gateway.responses import call_metadata, problem_of, public_url
from services.kernel.peers import Peers, with_token

_TYPES = {".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Pages:
    """The pages, as handlers."""

    def __init__(self, peers: Peers) -> None:
        self._logins = LoginsStub(peers.registry)

    def routes(self) -> list[web.RouteDef]:
        """Where they lie."""
        return [
            web.get("/", self.index),
            web.get("/docs", self.docs),
            web.get("/static/{name}", self.static),
            web.get("/api_tokens", self.login),
            web.post("/api_tokens", self.approve),
            web.get("/deployments/{name}", self.deployment),
            web.get("/codespaces/{name}", self.deployment),
        ]

    async def index(self, request: web.Request) -> web.Response:
        """What this is."""
        return _page("index", url=public_url(request))

    async def docs(self, request: web.Request) -> web.Response:
        """The API reference."""
        return _page("docs")

    async def deployment(self, request: web.Request) -> web.Response:
        """One deployment, drawn in the browser with a token that the visitor pastes."""
        return _page("deployment")

    async def static(self, request: web.Request) -> web.Response:
        """A style sheet or a script of the pages."""
        name = request.match_info["name"]
        kind = _TYPES.get(f".{name.rpartition('.')[2]}")
        file = resources.files("services.gateway") / "static" / name
        if kind is None or "/" in name or not file.is_file():
            raise NotFound(f"There is nothing at {request.path!r}.", reason="PATH_UNKNOWN", path=request.path)
        return web.Response(body=file.read_bytes(), content_type=kind, charset="utf-8", headers=_HEADERS)

    async def login(self, request: web.Request) -> web.Response:
        """Asks whether a command line may have a token."""
        code = request.rel_url.query.get("code", "")
        if not code:
            text = "Run `bentoml cloud login` or `ekiben login`: it opens this page with a code to approve."
            return _page("message", title="No login to approve", text=text)
        return _page("login", code=code, message="")

    async def approve(self, request: web.Request) -> web.Response:
        """Approves it in the name of the pasted token."""
        form = await request.post()
        code, token = str(form.get("code", "")).strip(), str(form.get("token", "")).strip()
        if not code or not token or not token.isascii():
            return _page("login", 400, code=code, message="Paste your API token to approve.", wrong=True)
        metadata = [pair for pair in call_metadata(request) if pair[0] != "authorization"]
        try:
            with with_token(token):
                await self._logins.ApproveLogin(
                    identity.ApproveLoginRequest(code=code),
                    metadata=(("authorization", f"Bearer {token}"), *metadata),
                )
        except EkibenError as error:
            return _page("login", problem_of(request, error).status, code=code, message=str(error), wrong=True)
        return _page("message", title="Approved", text="The command line is logged in. You can close this page.")


def _page(name: str, status: int = 200, *, wrong: bool = False, **values: str) -> web.Response:
    text = (resources.files("services.gateway") / "static" / f"{name}.html").read_text(encoding="utf-8")
    escaped = {key: html.escape(value) for key, value in values.items()}
    if wrong:
        escaped["message"] = f'<p class="wrong">{escaped["message"]}</p>'
    body = Template(text).substitute(escaped)
    return web.Response(text=body, status=status, content_type="text/html", headers=_HEADERS)
