"""Who we are to a registry: Basic, or a token from its token service for what is about to be done.

Source: distribution's "Token Authentication Specification" and "OAuth2 Token Authentication"; RFC 9110, 11.6.1.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from ekiben.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from services.content.images.registry.logins import Login, find_login
from services.content.images.registry.names import Location
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.problems import TRANSIENT, Answer, login_needed

Send = Callable[..., Awaitable[aiohttp.ClientResponse]]
_SCHEME = re.compile(r"(?:^|,)\s*([A-Za-z][A-Za-z0-9-]*)\s+(?=[A-Za-z_-]+\s*=)")
_PARAMETER = re.compile(r'([A-Za-z_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_MARGIN_S = 10.0
_LIFE_S = 60.0
"""Of a token that does not tell."""


@dataclass(frozen=True)
class _Challenge:
    scheme: str
    parameters: Mapping[str, str]


@dataclass
class _Token:
    text: str = field(repr=False)
    until: float


class Authority:
    """The header that a registry wants to see for a repository; asked for once and kept while it works."""

    def __init__(self, location: Location, options: RegistryOptions, send: Send) -> None:
        self._location = location
        self._options = options
        self._send = send
        self._challenge: _Challenge | None = None
        self._login: Login | None = None
        self._looked = False
        self._tokens: dict[frozenset[str], _Token] = {}
        self._lock = asyncio.Lock()

    async def header(self, scopes: frozenset[str]) -> str | None:
        """The header for requests within `scopes`; None before the registry has asked for one, and for anonymous.

        Raises:
            Unauthenticated: the token service does not know us (REGISTRY_LOGIN_NEEDED).
            Broken: its answer broke off, or it is busy.
        """
        if self._challenge is None:
            return None
        async with self._lock:
            remembered = self._looked
            login = await self._find_login()
            if self._challenge.scheme == "basic":
                return login.basic if login is not None and login.user else None
            token = self._tokens.get(scopes)
            if token is None or token.until <= time.monotonic():
                try:
                    token = await self._fetch(self._challenge, login, scopes)
                except Unauthenticated:
                    if not remembered:
                        raise
                    self._looked = False  # logins of clouds last for hours, and are written anew where they were found
                    token = await self._fetch(self._challenge, await self._find_login(), scopes)
                now = time.monotonic()
                self._tokens = {key: each for key, each in self._tokens.items() if each.until > now} | {scopes: token}
            return f"Bearer {token.text}"

    def challenged(self, headers: Any, scopes: frozenset[str], sent: str | None) -> bool:
        """Take in a 401; whether it is worth to ask again, as `header` may have another answer."""
        challenge = _best(headers.getall("WWW-Authenticate", ()))
        if challenge is None:
            return False
        first = self._challenge is None
        self._challenge = challenge
        token = self._tokens.get(scopes)
        if token is not None and sent == f"Bearer {token.text}":
            del self._tokens[scopes]
        elif not first and challenge.scheme == "basic":
            self._looked = False  # what was found before may have been replaced
        return True

    async def _find_login(self) -> Login | None:
        if not self._looked:
            self._login = await find_login(self._location.host, self._location.repository, self._options)
            self._looked = True
        return self._login

    async def _fetch(self, challenge: _Challenge, login: Login | None, scopes: frozenset[str]) -> _Token:
        host, repository = self._location.host, self._location.repository
        try:
            realm = URL(challenge.parameters.get("realm") or "")
        except ValueError as exc:
            raise login_needed(host, repository, f"it names no token service that can be asked ({exc})") from exc
        if realm.scheme not in ("http", "https") or not realm.host:
            raise login_needed(host, repository, f"it names no token service that can be asked ({realm})")
        if realm.scheme == "http" and host not in self._options.insecure:
            raise FailedPrecondition(
                f"{host} sends for tokens to {realm.with_query(None)}, in the clear, where the login would be read by "
                f"anybody. Use a registry with TLS, or allow it by EKIBEN_REGISTRY_INSECURE={host}.",
                reason="REGISTRY_INSECURE",
                host=host,
            )
        # What it names of repositories is what we ask for anyway, in another order or of the request before.
        named = (each for each in challenge.parameters.get("scope", "").split(" ") if each)
        wanted = sorted(scopes | {each for each in named if not each.startswith("repository:")})
        service = challenge.parameters.get("service")
        query = [("service", service)] if service else []
        headers: dict[str, str] = {}
        if login is not None and login.identity_token:
            form = [*query, ("scope", " ".join(wanted)), ("client_id", "ekiben")]
            form += [("grant_type", "refresh_token"), ("refresh_token", login.identity_token)]
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            response = await self._send("POST", realm, headers=headers, data=urlencode(form).encode())
        else:
            if login is not None:
                headers["Authorization"] = login.basic
                query.append(("account", login.user))
            url = realm.update_query([*realm.query.items(), *query, *(("scope", each) for each in wanted)])
            response = await self._send("GET", url, headers=headers)
        async with response:
            if response.status != 200:
                answer = await Answer.of(response)
                if answer.status in TRANSIENT:
                    raise answer.transient()
                raise login_needed(host, repository, f"its token service {realm.host} said {answer}")
            try:
                found = json.loads((await Answer.whole(response, self._options.whole_s)).body)
                text = str(found.get("token") or found["access_token"])
                life = float(found.get("expires_in") or _LIFE_S)
            except InvalidArgument as exc:
                raise login_needed(host, repository, "its token service sent a token of more than 4 MiB") from exc
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
                raise login_needed(host, repository, f"its token service {realm.host} gave no token") from exc
        return _Token(text, time.monotonic() + max(life - _MARGIN_S, life / 2))


def _best(headers: Any) -> _Challenge | None:
    """The challenge that can be met best: a token, which says what it is for, before the password itself."""
    found: dict[str, _Challenge] = {}
    for header in headers:
        schemes = list(_SCHEME.finditer(header))
        for match, following in zip(schemes, [*schemes[1:], None], strict=False):
            text = header[match.end() : following.start() if following else len(header)]
            parameters = {
                name.lower(): re.sub(r"\\(.)", r"\1", quoted) or bare for name, quoted, bare in _PARAMETER.findall(text)
            }
            found.setdefault(match[1].lower(), _Challenge(match[1].lower(), parameters))
    return found.get("bearer") or found.get("basic")
