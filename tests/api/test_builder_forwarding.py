"""Images that the builder keeps in another registry, pulled through `/v2/`: a real registry, which asks for a login."""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.builder.forwarding import _Shown, open_forwarding
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore
from services.content.images.registry.names import parse
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import open_registry
from tests.fixtures_distribution import ABSENT, Served, serving
from tests.image_content import digest_of, put_image, put_referrer
from tests.oci_proxy import faulty_registry
from tests.oci_registry import MISSING, OciRegistry, distribution, run_registry


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[OciRegistry]:
    """A registry that knows one user."""
    if distribution() is None:
        pytest.skip(MISSING)
    with run_registry(login=True) as registry:
        yield registry


@contextlib.asynccontextmanager
async def through(
    registry: OciRegistry, folder: Path, host: str = ""
) -> AsyncIterator[tuple[Served, str, RegistryOptions]]:
    """`/v2/` before a registry, the prefix in it, and how the registry is spoken to."""
    host = host or registry.host
    file = folder / "config.json"
    file.write_text(json.dumps({"auths": {host: {"auth": registry.auth()}}}))
    options = RegistryOptions(login_files=(file,), insecure=frozenset({host}), attempts=3, backoff_s=0.02, stall_s=10)
    prefix = f"{host}/{registry.new_repository('kept')}"
    async with open_forwarding(prefix, options) as shelf, serving(shelf, folder / "layout") as served:
        yield served, prefix, options


async def push(served: Served, reference: str, prefix: str, options: RegistryOptions) -> None:
    """Copy an image of the layout, with what is attached to it."""
    async with open_registry(f"{prefix}/{reference}", options) as (store, tag):
        await copy_image(LayoutImageStore(served.layout), reference, store, tag)


async def test_everything_of_an_image_is_pulled_through(elsewhere: OciRegistry, tmp_path: Path) -> None:
    async with through(elsewhere, tmp_path) as (served, prefix, options):
        content = os.urandom(3 << 20)
        image = await put_image(served.layout, "default/far:v1", {"weights": content})
        bill = await put_referrer(served.layout, image, "application/vnd.cyclonedx+json", b"bill")
        await push(served, "default/far:v1", prefix, options)
        status, headers, body = await served("/v2/default/far/manifests/v1")
        assert (status, digest_of(body), headers["Content-Type"]) == (200, image.digest, image.media_type)
        assert headers["Docker-Content-Digest"] == str(image.digest)
        by_digest = f"/v2/default/far/manifests/{image.digest}"
        assert (await served(by_digest, "HEAD"))[0] == 200
        (layer,) = json.loads(body)["layers"]
        path = f"/v2/default/far/blobs/{layer['digest']}"
        status, headers, whole = await served(path)
        assert (status, str(digest_of(whole))) == (200, layer["digest"])
        status, headers, part = await served(path, Range="bytes=1048576-")
        assert (status, part == whole[1 << 20 :]) == (206, True)
        assert headers["Content-Range"] == f"bytes 1048576-{layer['size'] - 1}/{layer['size']}"
        status, headers, nothing = await served(path, "HEAD")
        assert (status, nothing, int(headers["Content-Length"])) == (200, b"", layer["size"])
        assert (await served(path, Range=f"bytes={layer['size']}-"))[0] == 416
        tags = json.loads((await served("/v2/default/far/tags/list"))[2])
        assert tags["name"] == "default/far" and "v1" in tags["tags"]
        listed = json.loads((await served(f"/v2/default/far/referrers/{image.digest}"))[2])
        assert [each["digest"] for each in listed["manifests"]] == [str(bill.digest)]


async def test_what_is_not_there_and_who_may_not(elsewhere: OciRegistry, tmp_path: Path) -> None:
    async with through(elsewhere, tmp_path) as (served, prefix, options):
        await put_image(served.layout, "default/far:v1")
        await put_image(served.layout, "other/far:v1")
        await push(served, "default/far:v1", prefix, options)
        await push(served, "other/far:v1", prefix, options)
        assert await served.code("/v2/default/far/manifests/v2", 404) == "MANIFEST_UNKNOWN"
        assert await served.code("/v2/default/nothing/manifests/v2", 404) == "MANIFEST_UNKNOWN"
        assert await served.code(f"/v2/default/far/blobs/{ABSENT}", 404) == "BLOB_UNKNOWN"
        assert await served.code("/v2/other/far/manifests/v1", 404) == "NAME_UNKNOWN"
        assert await served.code("/v2/default/far/manifests/v1", 405, "PUT") == "UNSUPPORTED"
        assert await served.code("/v2/default/far/manifests/v1", 401, token="") == "UNAUTHORIZED"
        assert await served.code("/v2/_catalog", 501) == "UNSUPPORTED"


async def test_what_the_registry_refuses_the_builder_is_not_the_callers_login(
    elsewhere: OciRegistry, tmp_path: Path
) -> None:
    options = RegistryOptions(insecure=frozenset({elsewhere.host}), attempts=1)
    async with open_forwarding(f"{elsewhere.host}/kept", options) as shelf, serving(shelf, tmp_path) as served:
        status, headers, body = await served("/v2/default/far/manifests/v1")
        assert (status, "WWW-Authenticate" in headers) == (503, False)
        assert b"refuses the builder" in body
        assert await served.code(f"/v2/default/far/blobs/{ABSENT}", 503) == "UNAVAILABLE"


async def test_a_registry_that_fails_or_breaks_off(elsewhere: OciRegistry, tmp_path: Path) -> None:
    async with (
        faulty_registry(elsewhere) as proxy,
        through(elsewhere, tmp_path, proxy.host) as (served, prefix, options),
    ):
        await put_image(served.layout, "default/far:v1", {"weights": os.urandom(3 << 20)})
        await push(served, "default/far:v1", prefix, options)
        manifest = json.loads((await served("/v2/default/far/manifests/v1"))[2])
        path = f"/v2/default/far/blobs/{manifest['layers'][0]['digest']}"
        whole = (await served(path))[2]
        proxy.choose = lambda operation, count: "half:1048576" if operation == "GET blob" else ""
        got = b""
        with contextlib.suppress(Exception):
            async with served.session.get(f"{served.url}{path}", headers={"Authorization": "Bearer viewer"}) as answer:
                async for chunk in answer.content.iter_any():
                    got += chunk
        assert len(got) < len(whole) and whole.startswith(got)
        proxy.choose = lambda operation, count: ""
        assert got + (await served(path, Range=f"bytes={len(got)}-"))[2] == whole
        proxy.choose = lambda operation, count: "500"
        assert await served.code(path, 503) == "UNAVAILABLE"
        assert await served.code("/v2/default/far/manifests/v1", 503) == "UNAVAILABLE"


@pytest.mark.parametrize("prefix", ["docker.io", "docker.io/team", "registry.example.com"])
async def test_every_request_is_for_the_same_repository(prefix: str) -> None:
    """On Docker Hub a name of one word means one in `library`, which `ORGANIZATION` alone is not."""
    named = parse(f"{prefix}/acme/summarizer")
    async with open_forwarding(prefix, RegistryOptions()) as shelf:
        shown = await shelf.find("acme/summarizer")
        assert isinstance(shown, _Shown)
        url = await shown._client.url(f"{shown._repository}/manifests/v1")
        assert str(url) == f"https://{named.api_host}/v2/{named.repository}/manifests/v1"
        assert shown._scopes == {f"repository:{named.repository}:pull"}
        assert parse(shown._name) == named
