"""Who we are to a registry: tokens for what is done and no more, and never to anybody else."""

import base64
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509 import load_pem_x509_certificate

from ekiben.errors import FailedPrecondition, Unauthenticated
from services.content.images.registry.logins import Login
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import RegistryImageStore, open_registry
from tests import oci_registry as registries
from tests.certificates import certificates
from tests.image_stores import described, of, put, read
from tests.oci_proxy import faulty_registry
from tests.oci_registry import OciRegistry, run_registry
from tests.platform import free_port


@dataclass
class TokenService:
    """What stands beside a registry and says who may do what there; by the specification, and with a few bad days."""

    certs: Path
    port: int
    asked: list[dict[str, Any]] = field(default_factory=list)
    expired: int = 0
    """So many of the next tokens do not work any more."""
    away: int = 0
    """So many of the next requests are answered with 503."""

    async def answer(self, request: web.Request) -> web.Response:
        given = dict(await request.post()) if request.method == "POST" else {}
        login = request.headers.get("Authorization", "")
        scopes = str(given["scope"]).split(" ") if given else request.query.getall("scope", [])
        self.asked.append(
            {"login": login, "scopes": sorted(scopes), "form": given, "account": request.query.get("account")}
        )
        if self.away:
            self.away -= 1
            return web.Response(status=503)
        known = login == "Basic " + base64.b64encode(b"me:right").decode() or given.get("refresh_token") == "refresh"
        if (login or given) and not known:
            return web.json_response({"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]}, status=401)
        token = self.token([each.split(":") for each in scopes], known)
        return web.json_response({"token": token, "expires_in": 3600})

    def token(self, scopes: list[list[str]], known: bool) -> str:
        """A JWT that distribution accepts; strangers may pull only, and nobody anything from `secret/`."""
        now = time.time() - (7200 if self.expired else 0)
        self.expired -= bool(self.expired)
        access = [
            {"type": kind, "name": name, "actions": [each for each in actions.split(",") if known or each == "pull"]}
            for kind, name, actions in scopes
            if not name.startswith("secret/")
        ]
        claims = {"iss": "tests", "aud": "registry", "sub": "me", "jti": os.urandom(4).hex(), "access": access}
        times = {"iat": int(now), "nbf": int(now) - 10, "exp": int(now) + 600}
        leaf = load_pem_x509_certificate((self.certs / "cert.pem").read_bytes())
        x5c = base64.b64encode(leaf.public_bytes(serialization.Encoding.DER)).decode()
        head = {"alg": "ES256", "typ": "JWT", "x5c": [x5c]}
        signed = ".".join(_url64(json.dumps(each).encode()) for each in (head, {**claims, **times}))
        key = serialization.load_pem_private_key((self.certs / "key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_url64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OciRegistry, TokenService]]:
    """A registry that sends for tokens, and the service, which each test runs while it needs it."""
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    certs = tmp_path_factory.mktemp("authority")
    certificates(certs)
    service = TokenService(certs, free_port())
    token = {"realm": f"http://127.0.0.1:{service.port}/token", "service": "registry", "issuer": "tests"}
    settings = {"auth": {"token": {**token, "rootcertbundle": str(certs / "ca.pem"), "signingalgorithms": ["ES256"]}}}
    with run_registry(settings=settings) as registry:
        yield registry, service


@pytest.fixture
async def service(guarded: tuple[OciRegistry, TokenService]) -> AsyncIterator[TokenService]:
    app = web.Application()
    app.router.add_route("*", "/token", guarded[1].answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", guarded[1].port).start()
    guarded[1].asked.clear()
    guarded[1].expired = guarded[1].away = 0
    yield guarded[1]
    await runner.cleanup()


@asynccontextmanager
async def opened(
    registry: OciRegistry, repository: str, folder: Path, entry: dict[str, str] | None
) -> AsyncIterator[RegistryImageStore]:
    file = folder / "logins.json"
    file.write_text(json.dumps({"auths": {registry.host: entry} if entry else {}}))
    options = RegistryOptions((file,), insecure=frozenset({registry.host}), attempts=3, backoff_s=0.01)
    async with open_registry(f"{registry.host}/{repository}", options) as (store, _):
        yield store


def login(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize("entry", [login("me:right"), {"identitytoken": "refresh"}], ids=["password", "identity token"])
async def test_a_token_is_fetched_for_what_is_done_and_used_while_it_lasts(
    guarded: tuple[OciRegistry, TokenService], service: TokenService, tmp_path: Path, entry: dict[str, str]
) -> None:
    registry, repository = guarded[0], guarded[0].new_repository()
    async with opened(registry, repository, tmp_path, entry) as store:
        await put(store, "v1", os.urandom(100))
        await put(store, "v2", os.urandom(100))
        await store.references()
    pull, push = f"repository:{repository}:pull", f"repository:{repository}:pull,push"
    assert {tuple(each["scopes"]) for each in service.asked} == {(push,), (pull,)}
    assert len(service.asked) == 2, "a token was fetched again while it worked"
    assert all(each["account"] in ("me", None) for each in service.asked)


async def test_a_token_that_stops_working_is_replaced_and_a_service_that_is_away_is_waited_for(
    guarded: tuple[OciRegistry, TokenService], service: TokenService, tmp_path: Path
) -> None:
    async with opened(guarded[0], guarded[0].new_repository(), tmp_path, login("me:right")) as store:
        service.expired, service.away = 1, 1
        content = os.urandom(3 << 20)
        await store.write(of(content[: 1 << 20], content[1 << 20 :]), described(content))
        assert await read(store, described(content)) == content
        assert (service.expired, service.away) == (0, 0)


async def test_a_login_that_was_written_anew_is_found_while_a_store_is_open(
    guarded: tuple[OciRegistry, TokenService], service: TokenService, tmp_path: Path
) -> None:
    file = tmp_path / "logins.json"
    async with opened(guarded[0], guarded[0].new_repository(), tmp_path, login("me:right")) as store:
        await store.references()
        file.write_text(json.dumps({"auths": {guarded[0].host: login("me:wrong")}}))
        store._client._authority._looked = False  # as if it had been found long ago
        with pytest.raises(Unauthenticated):
            await store.write(of(b"with a password that ran out"))
        file.write_text(json.dumps({"auths": {guarded[0].host: login("me:right")}}))
        await store.write(of(b"with the new one"))
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    with run_registry(tmp_path / "registry", login=True) as registry:
        async with opened(registry, "a/b", tmp_path, {"auth": registry.auth()}) as store:
            assert await store.references() == []
            store._client._authority._login = Login("me", "ran out")
            assert await store.references() == []
            file.write_text(json.dumps({"auths": {registry.host: login("me:wrong")}}))
            store._client._authority._login = Login("me", "ran out")
            with pytest.raises(Unauthenticated, match="docker login"):
                await store.references()


async def test_a_mount_asks_for_both_repositories_and_does_without_where_it_may_not(
    guarded: tuple[OciRegistry, TokenService], service: TokenService, tmp_path: Path
) -> None:
    registry = guarded[0]
    one, other, hidden = registry.new_repository(), registry.new_repository(), registry.new_repository("secret")
    content = os.urandom(1000)
    async with opened(registry, one, tmp_path, login("me:right")) as store:
        await store.write(of(content))
    async with opened(registry, other, tmp_path, login("me:right")) as store:
        assert await store.mount(described(content), f"docker://{registry.host}/{one}")
        assert await store.size(described(content).digest) == 1000
        assert not await store.mount(described(content), f"docker://{registry.host}/{hidden}")
        assert not await store.mount(described(content), "docker://registry.example.com/other")
        assert not await store.mount(described(content), "oci:/somewhere")
    scopes = [f"repository:{one}:pull", f"repository:{other}:pull,push"]
    assert sorted(scopes) in [each["scopes"] for each in service.asked]


async def test_strangers_may_read_and_are_told_to_log_in_to_write(
    guarded: tuple[OciRegistry, TokenService], service: TokenService, tmp_path: Path
) -> None:
    registry, repository = guarded[0], guarded[0].new_repository()
    async with opened(registry, repository, tmp_path, login("me:right")) as store:
        made = await put(store, "v1", b"for all")
    async with opened(registry, repository, tmp_path, None) as store:
        assert (await store.find("v1")).digest == made.digest
        with pytest.raises(Unauthenticated, match="docker login") as caught:
            await store.write(of(b"not for all"))
        assert caught.value.reason == "REGISTRY_LOGIN_NEEDED"
    async with opened(registry, repository, tmp_path, login("me:wrong")) as store:
        with pytest.raises(Unauthenticated, match="wrong password"):
            await store.find("v1")


async def test_a_token_service_in_the_clear_is_refused_unless_it_was_allowed(
    guarded: tuple[OciRegistry, TokenService], service: TokenService, tmp_path: Path
) -> None:
    async with opened(guarded[0], "a/b", tmp_path, login("me:right")) as store:
        store._client._authority._options = RegistryOptions()  # what it would be behind TLS
        with pytest.raises(FailedPrecondition, match="in the clear") as caught:
            await store.find("v1")
        assert caught.value.reason == "REGISTRY_INSECURE"
    assert service.asked == []


async def test_a_redirect_to_another_host_is_followed_without_the_login(tmp_path: Path) -> None:
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    content = os.urandom(3 << 20)
    seen: list[dict[str, str]] = []

    async def bucket(request: web.Request) -> web.StreamResponse:
        seen.append(dict(request.headers))
        return web.Response(body=content)

    app = web.Application()
    app.router.add_get("/bucket", bucket)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    elsewhere = f"http://127.0.0.1:{runner.addresses[0][1]}/bucket?signature=a%2Fb"
    try:
        with run_registry(tmp_path / "registry", login=True) as registry:
            async with faulty_registry(registry) as proxy:
                file = tmp_path / "logins.json"
                file.write_text(json.dumps({"auths": {proxy.host: {"auth": registry.auth()}}}))
                options = RegistryOptions((file,), insecure=frozenset({proxy.host}), attempts=3, backoff_s=0.01)
                async with open_registry(f"{proxy.host}/a/b", options) as (store, _):
                    await store.write(of(content))
                    proxy.choose = lambda operation, count: f"move:{elsewhere}" if operation == "GET blob" else ""
                    assert await read(store, described(content)) == content
                    assert len(seen) == 1 and "Authorization" not in seen[0]
                    assert ("GET blob", f"Basic {registry.auth()}") in proxy.logins
                    proxy.choose = lambda operation, count: (
                        f"move:http://{proxy.host}/v2/a/b/blobs/{described(content).digest}"
                    )
                    with pytest.raises(Exception, match="redirects again and again"):
                        await read(store, described(content))
                    store._client.options = RegistryOptions((file,), attempts=3, backoff_s=0.01)
                    proxy.choose = lambda operation, count: f"move:{elsewhere}"
                    with pytest.raises(FailedPrecondition, match=r"redirects to .* in the clear"):
                        await read(store, described(content))
                    assert len(seen) == 1
    finally:
        await runner.cleanup()


async def test_a_client_shows_its_certificate_to_the_registry_that_asks_for_one(tmp_path: Path) -> None:
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    with run_registry(tmp_path / "registry", tls=True, client_certificates=True) as registry:
        assert registry.certificates is not None
        folder = tmp_path / "certs.d" / registry.host
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes((registry.certificates / "ca.pem").read_bytes())
        options = RegistryOptions(certificates=(tmp_path / "certs.d",), attempts=2, backoff_s=0.01)
        async with open_registry(f"{registry.host}/a/b", options) as (store, _):
            with pytest.raises(Exception, match=r"certificate|SSL|reset|closed|disconnected"):
                await store.references()
        (folder / "client.cert").write_bytes((registry.certificates / "cert.pem").read_bytes())
        (folder / "client.key").write_bytes((registry.certificates / "key.pem").read_bytes())
        async with open_registry(f"{registry.host}/a/b", options) as (store, _):
            made = await put(store, "v1", b"content")
            assert (await store.find("v1")).digest == made.digest
        (folder / "client.key").write_text("no key")
        async with open_registry(f"{registry.host}/a/b", options) as (store, _):
            with pytest.raises(FailedPrecondition, match=r"client\.cert .* cannot be used"):
                await store.references()
