"""Requests to one repository of a registry: logins, redirects, retries.

Nothing that says who we are goes to another host than the registry and its token service; redirects, which registries
use to hand blobs out of a bucket, are followed without it.
"""

import asyncio
import logging
import random
import re
import ssl
import time
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator, Collection, Mapping
from typing import Any

import aiohttp
from yarl import URL

from ekiben.errors import EkibenError, FailedPrecondition, PermissionDenied, Unavailable
from services.content.images.registry.names import Location
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.problems import TRANSIENT, Answer, Broken
from services.content.images.registry.tokens import Authority

log = logging.getLogger(__name__)

_OF_PYTHON = re.compile(r" ssl:(?:<[^>]*>|default|True|False|None)")
"""What aiohttp says of its own objects."""
_CONNECT_S = 10.0
_REDIRECTS = 5
_LONGEST_WAIT_S = 20.0
_READ_BYTES = 1 << 20
_QUIET_S = 5.0
"""Nobody is told what takes less."""
Body = bytes | AsyncIterable[bytes] | None


class Client:
    """Requests. Close it by `close`."""

    def __init__(self, location: Location, options: RegistryOptions) -> None:
        self.location = location
        self.options = options
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._session: aiohttp.ClientSession | None = None
        self._base: URL | None = None
        self._finding = asyncio.Lock()
        self._authority = Authority(location, options, self._send)

    async def close(self) -> None:
        """End its connections."""
        if self._session is not None:
            await self._session.close()

    def scopes(self, actions: str, repository: str = "") -> frozenset[str]:
        """What a token must be good for: `pull`, or `pull,push`."""
        return frozenset({f"repository:{repository or self.location.repository}:{actions}"})

    async def ask(
        self, method: str, path: str, what: str, accepted: Collection[int], scopes: frozenset[str], **request: Any
    ) -> Answer:
        """Make a request which does no harm when it is made twice, again and again while that may help.

        `path` is relative to the repository. `what` is for errors: "{host} refuses to {what}".

        Raises:
            Unavailable: REGISTRY_UNAVAILABLE.
            ResourceExhausted: REGISTRY_BUSY, REGISTRY_FULL.
            Unauthenticated, PermissionDenied, NotFound, FailedPrecondition: as `Answer.error` says.
            InvalidArgument: the answer is too large (MANIFEST_INVALID).
        """
        patience = Patience(self.options)
        while True:
            try:
                async with await self.once(method, await self.url(path), what, accepted, scopes, **request) as response:
                    return await Answer.whole(response, self.options.whole_s)
            except Broken as exc:
                await patience.wait(exc, self.location.host, what)
            except Refused as exc:
                raise exc.error from None

    async def once(
        self,
        method: str,
        url: URL,
        what: str,
        accepted: Collection[int],
        scopes: frozenset[str],
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        timeout_s: float | None = None,
    ) -> aiohttp.ClientResponse:
        """Make a request; a 401 is answered by a login if the body can be had again.

        Raises:
            Broken: it may work when it is made again.
            Refused: it will not, by what the registry says.
            EkibenError: it will not, for another reason.
        """
        asked_again = False
        while True:
            authorization = await self._authority.header(scopes)
            given = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
            response = await self._redirected(method, url, given, body, timeout_s)
            if response.status in accepted:
                return response
            async with response:
                answer = await Answer.of(response)
            if answer.status == 401 and not same_server(response.url, await self._find_base()):
                # What it says of logins is not the registry's word: it would name a realm of its own.
                raise Refused(answer, self._sent_in_vain(response.url, what, answer))
            if answer.status == 401 and self._authority.challenged(answer.headers, scopes, authorization):
                if asked_again:
                    raise Refused(answer, answer.error(self.location.host, self.location.repository, what))
                if isinstance(body, AsyncIterator):
                    raise Broken(f"the login ran out: {answer}")  # another is fetched for the next request
                asked_again = True
                continue
            if answer.status in TRANSIENT:
                raise answer.transient()
            raise Refused(answer, answer.error(self.location.host, self.location.repository, what))

    def _sent_in_vain(self, url: URL, what: str, answer: Answer) -> EkibenError:
        host = self.location.host
        return PermissionDenied(
            f"{url.host}, where {host} sends for it without a login, refuses to {what}: {answer}. Try again; if it "
            f"goes on, ask the administrator of {host}.",
            reason="REGISTRY_REFUSED",
            host=host,
        )

    async def url(self, path: str) -> URL:
        """The address of something in the repository."""
        return (await self._find_base()).join(URL(f"{self.location.repository}/{path}", encoded=True))

    async def beside(self, location: str, current: URL) -> URL:
        """The address in a Location header. A registry behind a proxy that ends TLS often says http of itself."""
        base = await self._find_base()
        try:
            found = current.join(URL(location, encoded=True))
            # Not a bucket on another port.
            itself = found.host == base.host and found.explicit_port in (None, 80, base.port)
            str(found.origin()).encode("ascii")  # nobody translates names of other letters here
        except ValueError as exc:
            raise FailedPrecondition(
                f"{self.location.host} sends to {location[:100]!r}, which is no address: {exc}. Ask its administrator.",
                reason="REGISTRY_REFUSED",
                host=self.location.host,
            ) from exc
        if found.scheme == "http" and itself and base.scheme == "https":
            found = found.with_scheme("https").with_port(base.port)
        return found

    async def _redirected(
        self, method: str, url: URL, headers: dict[str, str], body: Body, timeout_s: float | None
    ) -> aiohttp.ClientResponse:
        base = await self._find_base()
        for _ in range(_REDIRECTS):
            ours = same_server(url, base)
            if url.scheme != "https" and not ours and self.location.host not in self.options.insecure:
                raise FailedPrecondition(
                    f"{self.location.host} redirects to {url.origin()}, in the clear. Use a registry that redirects to "
                    f"https, or allow it by EKIBEN_REGISTRY_INSECURE={self.location.host}.",
                    reason="REGISTRY_INSECURE",
                    host=self.location.host,
                )
            sent = headers if ours else {key: value for key, value in headers.items() if key != "Authorization"}
            response = await self._send(method, url, headers=sent, data=body, timeout_s=timeout_s)
            moved = response.status in (307, 308) or (response.status in (301, 302, 303) and method in ("GET", "HEAD"))
            if not moved or "Location" not in response.headers:
                return response
            response.release()
            url = await self.beside(response.headers["Location"], url)
            if isinstance(body, AsyncIterator):
                raise Broken("it redirects what cannot be sent twice")
        raise Broken("it redirects again and again")

    async def _send(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str] | None = None,
        data: Any = None,
        timeout_s: float | None = None,
    ) -> aiohttp.ClientResponse:
        """Make one request as it is. Raises Broken, or Unavailable where trying again will not help."""
        options = self.options
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=timeout_s or options.stall_s)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                read_bufsize=_READ_BYTES,
                skip_auto_headers=["Content-Type"],
                # Digests and lengths are those of the plain bytes, which are handed on as they come.
                headers={"User-Agent": "ekiben", "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        try:
            return await self._session.request(
                method,
                url,
                headers=headers,
                data=data,
                timeout=timeout,
                allow_redirects=False,
                proxy=_proxy(url),
                ssl=self._context(url) if url.scheme == "https" else True,
            )
        except (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError) as exc:
            raise Unavailable(
                f"{url.host} does not prove who it is: {exc.args[-1] if exc.args else exc}. Put its authority's "
                f"certificate into /etc/containers/certs.d/{self.location.host}/ca.crt, or allow it unproved by "
                f"EKIBEN_REGISTRY_INSECURE={self.location.host}.",
                reason="REGISTRY_UNTRUSTED",
                host=str(url.host),
            ) from exc
        except TimeoutError as exc:
            raise Broken(f"no answer from {url.host}:{url.port} in time") from exc
        except (aiohttp.ClientError, OSError, UnicodeError) as exc:  # the last of a name that no host can have
            said = _OF_PYTHON.sub("", str(exc)) or type(exc).__name__
            raise Broken(f"{said} ({url.host}:{url.port})") from exc

    async def _find_base(self) -> URL:
        """`https://HOST/v2/`; `http://` only for a host that may be insecure and does not speak TLS."""
        if self._base is None:
            async with self._finding:
                if self._base is None:
                    self._base = await self._look_for_base()
        return self._base

    async def _look_for_base(self) -> URL:
        secure = URL(f"https://{self.location.api_host}/v2/")
        if self.location.host not in self.options.insecure:
            return secure
        plain = secure.with_scheme("http").with_port(secure.explicit_port)
        try:
            (await self._send("GET", secure)).release()
        except (Broken, Unavailable):
            (await self._send("GET", plain)).release()
            return plain
        return secure

    def _context(self, url: URL) -> ssl.SSLContext:
        """What is trusted and shown there: a host that a registry redirects to sees no certificate for the registry."""
        ours = same_server(url, URL(f"https://{self.location.api_host}"))
        host = self.location.host if ours else url.raw_authority.rpartition("@")[2]
        if host not in self._contexts:
            self._contexts[host] = self.options.tls(host)
        return self._contexts[host]


def same_server(one: URL, other: URL) -> bool:
    """Whether both are of one server, whether or not they write its usual port."""
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


class Refused(Exception):
    """An answer that will not change; `error` is what it means if nobody knows better."""

    def __init__(self, answer: Answer, error: EkibenError) -> None:
        super().__init__(str(answer))
        self.answer = answer
        self.error = error


class Patience:
    """How long something is tried again: as long as it gets on, and a few times without."""

    def __init__(self, options: RegistryOptions) -> None:
        self._options = options
        self._failures = 0
        self._since = time.monotonic()

    def progress(self) -> None:
        """It got on: count anew."""
        self._failures, self._since = 0, time.monotonic()

    async def wait(self, broken: Broken, host: str, what: str) -> None:
        """Wait before the next try, as long as the server asks, or a random time. Raises its error after the last."""
        self._failures += 1
        if self._failures >= self._options.attempts:
            raise broken.error(host, what) from broken
        longest = min(self._options.backoff_s * 2 ** (self._failures - 1), _LONGEST_WAIT_S)
        asked = broken.retry_after_s
        # Everybody who was turned away is told the same time: some come a little later than that.
        seconds = longest * (0.5 + random.random() / 2) if asked is None else asked * (1 + random.random() / 5)
        log.info("%s does not %s: %s; again in %.1f s", host, what, broken, seconds)
        if max(seconds, time.monotonic() - self._since) >= _QUIET_S:
            why = "is busy" if broken.busy else f"does not {what}: {broken}"
            self._options.say(f"{host} {why}; again in {seconds:.0f} s.")
        await asyncio.sleep(seconds)
        self._since = time.monotonic()


def _proxy(url: URL) -> str | None:
    host = url.host or ""
    if host in ("localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)
