"""Registries, and hosts that they send to, which mean no good or were never taught the specification."""

import asyncio
import base64
import contextlib
import gzip
import json
import os
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from ekiben.errors import EkibenError, InvalidArgument, PermissionDenied, Unauthenticated
from services.content.attestations import verification
from services.content.images import INDEX, Again
from services.content.images.registry import pages, uploads
from services.content.images.registry.client import Client, same_server
from services.content.images.registry.names import parse
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import RegistryImageStore, open_registry
from tests import oci_registry as registries
from tests.image_stores import described, of, put, read
from tests.oci_registry import run_registry

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
LOGIN = "Basic " + base64.b64encode(b"me:secret").decode()


@asynccontextmanager
async def running(handler: Handler) -> AsyncIterator[str]:
    """A server; its host and port."""
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def opened(host: str, folder: Path) -> AsyncIterator[RegistryImageStore]:
    """The repository `a/b` of a host for which there is a login."""
    file = folder / "logins.json"
    file.write_text(json.dumps({"auths": {host: {"auth": LOGIN.removeprefix("Basic ")}}}))
    options = RegistryOptions((file,), insecure=frozenset({host}), attempts=3, backoff_s=0.01)
    async with open_registry(f"{host}/a/b", options) as (store, _):
        yield store


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
@pytest.mark.parametrize("known", [False, True], ids=["stranger", "logged in"])
async def test_a_host_that_is_sent_to_cannot_ask_for_the_login(tmp_path: Path, scheme: str, known: bool) -> None:
    seen: list[tuple[str, str | None]] = []

    async def bucket(request: web.BaseRequest) -> web.StreamResponse:
        seen.append((request.path, request.headers.get("Authorization")))
        if request.path == "/token":
            return web.json_response({"token": "given"})
        challenge = f'{scheme} realm="http://{request.host}/token",service="x"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        if known and request.headers.get("Authorization") != LOGIN:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="registry"'})
        if request.method == "POST":
            return web.Response(status=202, headers={"Location": f"http://{elsewhere}/upload"})
        return web.Response(status=307, headers={"Location": f"http://{elsewhere}/blob"})

    async with running(bucket) as elsewhere, running(registry) as host, opened(host, tmp_path) as store:
        with pytest.raises(PermissionDenied, match=r"127\.0\.0\.1, .* refuses to give") as caught:
            await read(store, described(b"content"))
        assert caught.value.reason == "REGISTRY_REFUSED"
        with pytest.raises(PermissionDenied, match="refuses to take"):
            await store.write(of(b"content"))
    assert {path for path, _ in seen} == {"/blob", "/upload"}
    assert {authorization for _, authorization in seen} == {None}


async def test_a_token_service_that_is_no_address_is_told(tmp_path: Path) -> None:
    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=401, headers={"WWW-Authenticate": 'Bearer realm="https://tokens:99999/"'})

    async with running(registry) as host, opened(host, tmp_path) as store:
        with pytest.raises(Unauthenticated, match="names no token service"):
            await store.find("v1")


async def test_an_error_and_an_index_that_are_nested_deep_are_told(tmp_path: Path) -> None:
    deep, status = "[" * 100_000, 400

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        text = f'{{"errors": {deep}' if status == 400 else f'{{"manifests": {deep}'
        return web.Response(status=status, text=text, content_type=INDEX)

    async with running(registry) as host, opened(host, tmp_path) as store:
        with pytest.raises(EkibenError) as caught:
            await store.find("v1")
        assert caught.value.reason == "REGISTRY_REFUSED"
        status = 200
        with pytest.raises(InvalidArgument) as unreadable:
            await verification.subjects(store, await store.find("v1"))
        assert unreadable.value.reason == "MANIFEST_INVALID"


@pytest.mark.parametrize("place", ["https://h:99999/x", "https://h:abc/x", "http://[::1", "https://a..b/"])
async def test_places_that_are_no_address_are_told(tmp_path: Path, place: str) -> None:
    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        if request.path.endswith("/tags/list"):
            return web.json_response({"tags": ["v1"]}, headers={"Link": f'<{place}>; rel="next"'})
        return web.Response(status=202 if request.method == "POST" else 307, headers={"Location": place})

    async with running(registry) as host, opened(host, tmp_path) as store:
        for work in (lambda: read(store, described(b"content")), lambda: store.write(of(b"content"))):
            with pytest.raises(EkibenError) as caught:
                await work()
            assert caught.value.reason in ("REGISTRY_REFUSED", "REGISTRY_UNAVAILABLE")
        if "a..b" not in place:  # of the next page only what follows the path is asked for
            with pytest.raises(InvalidArgument, match="next page has no address"):
                await store.references()


async def test_answers_are_asked_for_and_read_without_compression(tmp_path: Path) -> None:
    """What has a digest and a length is the plain bytes: nobody undoes a compression of the transport."""
    asked: set[str] = set()
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        asked.add(request.headers.get("Accept-Encoding", ""))
        body, headers = index, {"Content-Type": INDEX}
        if request.path == "/token":
            body, headers = b'{"token": "given"}', {"Content-Type": "application/json"}
        elif request.headers.get("Authorization") != "Bearer given":
            challenge = f'Bearer realm="http://{request.host}/token",service="x"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
        return web.Response(body=body, headers=headers)

    async with running(registry) as host, opened(host, tmp_path) as store:
        assert (await store.find("v1")).digest == described(index).digest
        assert await read(store, described(index, INDEX)) == index
    assert asked == {"identity"}


async def test_a_token_that_breaks_off_is_asked_for_again_and_an_endless_one_is_not_read(tmp_path: Path) -> None:
    answers = ["cut", "good"]

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/token":
            if request.headers.get("Authorization") == "Bearer given":
                return web.json_response({"tags": ["v1"]})
            challenge = f'Bearer realm="http://{request.host}/token",service="x"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        answer = answers.pop(0) if answers else "endless"
        if answer == "good":
            return web.json_response({"token": "given"})
        response = web.StreamResponse(headers={"Content-Length": str(100 << 20)})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(b'{"token": "')
            for _ in range(0 if answer == "cut" else 100):
                await response.write(bytes(1 << 20))
        assert request.transport is not None
        request.transport.close()
        return response

    async with running(registry) as host:
        async with opened(host, tmp_path) as store:
            assert await store.references() == ["v1"]
        assert answers == []
        async with opened(host, tmp_path) as store:
            with pytest.raises(Unauthenticated, match="more than 4 MiB"):
                await store.references()


@pytest.mark.parametrize("kind", ["same", "other", "empty"])
async def test_a_list_without_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(pages, "_MAX_PAGES", 50)
    monkeypatch.setattr(pages, "_MAX_BYTES", 100_000)
    asked: Counter[str] = Counter()

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        name = "tags" if "/tags/" in request.path else "manifests"
        asked[request.path] += 1
        number = 0 if kind == "same" else asked[request.path]
        entries: list[Any] = [described(b"%d" % number).to_json()] * 20 if name == "manifests" else [f"v{number}"] * 200
        listed = {name: [] if kind == "empty" else entries}
        link = f'<{request.path}?last={number}>; rel="next"'
        return web.json_response(listed, headers={"Link": link})

    async with running(registry) as host, opened(host, tmp_path) as store:
        for list_them in (store.references, lambda: store.referrers(described(b"subject").digest)):
            if kind == "same":
                assert len(await list_them()) == 1
            else:
                with pytest.raises(InvalidArgument, match=r"has no end") as caught:
                    await list_them()
                assert caught.value.reason == "MANIFEST_INVALID"
    assert max(asked.values()) <= (2 if kind == "same" else 51)


@pytest.mark.parametrize(
    ("host", "location"),
    [
        ("reg.example.com", "http://reg.example.com/upload"),
        ("reg.example.com", "http://reg.example.com:80/upload"),
        ("reg.example.com", "https://reg.example.com:443/upload"),
        ("reg.example.com:443", "https://reg.example.com/upload"),
        ("reg.example.com:5000", "http://reg.example.com/upload"),
        ("reg.example.com:5000", "http://REG.example.com:5000/upload"),
    ],
)
async def test_a_registry_that_names_itself_otherwise_is_the_registry(host: str, location: str) -> None:
    client = Client(parse(f"{host}/a/b"), RegistryOptions())
    there, registry = await client.beside(location, await client.url("blobs/uploads/")), await client.url("")
    assert there.scheme == "https" and same_server(there, registry)
    assert client._context(there) is client._context(registry)


@pytest.mark.parametrize("host", ["[::1]:5000", "Reg.example.com:5000", "Reg.example.com", "reg.example.com:443"])
async def test_a_host_may_be_insecure_however_it_is_written(host: str) -> None:
    url = URL(f"https://{host}/v2/")
    allowed = Client(parse(f"{host}/a/b"), RegistryOptions(insecure=frozenset({host})))
    assert allowed._context(url).verify_mode == ssl.CERT_NONE
    for other in (f"https://other.example.com/{host}", "https://reg.example.com:5001/", "https://[::1]:5001/"):
        assert allowed._context(URL(other)).verify_mode == ssl.CERT_REQUIRED
    refused = Client(parse(f"{host}/a/b"), RegistryOptions())
    assert refused._context(url).verify_mode == ssl.CERT_REQUIRED


async def test_a_registry_in_capitals_whose_certificate_is_not_checked(tmp_path: Path) -> None:
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    with run_registry(tmp_path / "registry", tls=True) as registry:
        async with opened(registry.host.replace("127.0.0.1", "LocalHost"), tmp_path) as store:
            made = await put(store, "v1", b"content")
            assert (await store.find("v1")).digest == made.digest


@pytest.mark.parametrize(
    "location", ["http://reg.example.com:9000/b", "https://reg.example.com:9000/b", "http://other.example.com/b"]
)
async def test_what_runs_beside_a_registry_is_not_the_registry(location: str) -> None:
    client = Client(parse("reg.example.com:5000/a/b"), RegistryOptions())
    registry = await client.url("blobs/uploads/")
    there = await client.beside(location, registry)
    assert there == URL(location)
    assert not same_server(there, registry), "it would be shown the login"


@pytest.mark.parametrize(
    ("least", "largest"),
    [("²", 64 << 10), ("9" * 5000, 64 << 10), (str(1 << 40), 1 << 20), (str(256 << 10), 256 << 10)],
)
async def test_a_registry_does_not_say_how_much_is_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: str, largest: int
) -> None:
    monkeypatch.setattr(uploads, "_PIECE_BYTES", 64 << 10)
    monkeypatch.setattr(uploads, "_MAX_PIECE_BYTES", 1 << 20)
    content, got, pieces = os.urandom(3 << 20), bytearray(), []

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        headers = {"Location": "/v2/a/b/blobs/uploads/1", "OCI-Chunk-Min-Length": least}
        if request.method == "POST":
            return web.Response(status=202, headers=headers)
        body = b"".join([chunk async for chunk in request.content.iter_any()])
        if request.method == "PUT":
            return web.Response(status=201 if got == content else 503, headers={"Retry-After": "²"})
        if request.method == "PATCH":
            pieces.append(len(body))
            got.extend(body)
            return web.Response(status=202, headers=headers)
        return web.Response(status=204, headers={**headers, "Range": "0-" + "0" * 5000})

    async with running(registry) as host, opened(host, tmp_path) as store:
        there = described(content)
        again = Again(lambda: of(*(content[at : at + (64 << 10)] for at in range(0, len(content), 64 << 10))))
        assert await store.write(again, there) == (there.digest, len(content))
    assert max(pieces) == largest


async def test_a_registry_that_answers_before_the_end_gets_the_rest_and_the_source_is_closed_meanwhile(
    tmp_path: Path,
) -> None:
    content, got, sources, asked = os.urandom(256 << 10), bytearray(), Counter[str](), asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        sources["open"] += 1
        try:
            yield content[: 64 << 10]
            await asked.wait()
            yield content[64 << 10 :]
        finally:
            sources["open"] -= 1

    async def registry(request: web.BaseRequest) -> web.StreamResponse:
        headers = {"Location": "/v2/a/b/blobs/uploads/1", "Range": f"0-{len(got) - 1}"}
        if request.method == "GET" and request.path.endswith("/uploads/1"):
            sources["left open"] += sources["open"]
            asked.set()
            return web.Response(status=204, headers=headers)
        if request.method == "PATCH":
            async for chunk in request.content.iter_any():
                got.extend(chunk)
                if len(got) == 64 << 10:
                    break
        if request.method == "PUT":
            return web.Response(status=201 if str(described(bytes(got)).digest) == request.query["digest"] else 400)
        return web.Response(status=202, headers=headers)

    async with running(registry) as host, opened(host, tmp_path) as store:
        written = await asyncio.wait_for(store.write(Again(source)), 60)
    assert written == (described(content).digest, len(content)) and bytes(got) == content
    assert sources["left open"] == sources["open"] == 0
