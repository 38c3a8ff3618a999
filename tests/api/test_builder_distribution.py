"""Images over HTTP as container engines pull them: what the OCI distribution API promises, over a layout on disk."""

import asyncio
import base64
import errno
import json
import logging
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest

from ekiben.errors import InvalidArgument, NotFound
from services.builder.pull_tokens import PullTokens
from services.builder.repositories import Repositories
from services.builder.shelves import LayoutShelf
from services.content.images import INDEX, MANIFEST, REF_NAME, Descriptor, Platform
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import open_registry
from tests.fixtures_distribution import ABSENT, Served, serving
from tests.fixtures_gateway import until
from tests.image_content import add_entries, digest_of, put_blob, put_image, put_index, put_referrer


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    layout = tmp_path / "images"
    async with serving(LayoutShelf(Repositories(layout)), layout) as served:
        yield served


async def test_an_image_is_pulled_by_tag_and_by_digest(served: Served) -> None:
    image = await put_image(served.layout, "default/summarizer:v1", {"hello": b"world" * 1000})
    status, headers, body = await served("/v2/default/summarizer/manifests/v1")
    assert (status, headers["Content-Type"], digest_of(body)) == (200, MANIFEST, image.digest)
    assert headers["Docker-Content-Digest"] == str(image.digest)
    assert headers["ETag"] == f'"{image.digest}"'
    assert headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    by_digest = f"/v2/default/summarizer/manifests/{image.digest}"
    assert (await served(by_digest))[2] == body
    assert (await served(by_digest.replace(":", "%3A")))[2] == body
    status, headers, nothing = await served("/v2/default/summarizer/manifests/v1", "HEAD")
    assert (status, nothing, int(headers["Content-Length"])) == (200, b"", len(body))
    assert (await served(by_digest, If_None_Match=f'"{image.digest}"'))[0] == 304
    assert served.pulled == [("default/summarizer", image.digest)] * 5
    manifest = json.loads(body)
    for descriptor in [manifest["config"], *manifest["layers"]]:
        path = f"/v2/default/summarizer/blobs/{descriptor['digest']}"
        status, headers, content = await served(path)
        assert (status, str(digest_of(content))) == (200, descriptor["digest"])
        status, headers, nothing = await served(path, "HEAD")
        assert (status, nothing, int(headers["Content-Length"])) == (200, b"", descriptor["size"])
        assert (await served(path, If_None_Match=headers["ETag"]))[0] == 304
    # The tag moves: who asked for it asks again, and the former manifest is no longer the repository's.
    moved = await put_image(served.layout, "default/summarizer:v1")
    assert (await served("/v2/default/summarizer/manifests/v1"))[1]["Docker-Content-Digest"] == str(moved.digest)
    assert await served.code(by_digest, 404) == "MANIFEST_UNKNOWN"


async def test_ranges_of_a_blob(served: Served) -> None:
    content = os.urandom((9 << 20) + 17)
    await put_image(served.layout, "default/ranges:v1", {"weights": content})
    manifest = json.loads((await served("/v2/default/ranges/manifests/v1"))[2])
    (layer,) = manifest["layers"]
    path, size = f"/v2/default/ranges/blobs/{layer['digest']}", layer["size"]
    _, headers, whole = await served(path)
    assert (len(whole), headers["Accept-Ranges"]) == (size, "bytes")
    assert str(digest_of(whole)) == layer["digest"]
    for asked, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=5-10", 5, 11),
        (f"bytes={size - 3}-", size - 3, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=4-{size + 100}", 4, size),
    ):
        status, headers, part = await served(path, Range=asked)
        assert (status, part == whole[start:stop]) == (206, True), asked
        assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
    status, headers, _ = await served(path, Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    # A condition on other content, or what is no range: the whole.
    assert (await served(path, Range="bytes=1-2", If_Range='"sha256:other"'))[0] == 200
    assert (await served(path, Range="bytes=1-2", If_Range=f'"{layer["digest"]}"'))[0] == 206
    assert (await served(path, Range="bytes=2-1"))[0] == 200


async def test_a_client_that_leaves_is_no_error(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    await put_image(served.layout, "default/left:v1", {"weights": os.urandom(32 << 20)})
    (layer,) = json.loads((await served("/v2/default/left/manifests/v1"))[2])["layers"]
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    with caplog.at_level(logging.INFO):
        reader, writer = await asyncio.open_connection(host, int(port))
        path = f"/v2/default/left/blobs/{layer['digest']}"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer viewer\r\n\r\n".encode())
        assert (await reader.read(1000)).startswith(b"HTTP/1.1 200")
        writer.transport.abort()
        await until(lambda: [each for each in caplog.records if getattr(each, "status", 0) == 499])
        assert (await served("/v2/"))[0] == 200
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_a_disk_that_fails_in_the_middle_ends_the_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await put_image(served.layout, "default/failing:v1", {"weights": os.urandom(4 << 20)})
    (layer,) = json.loads((await served("/v2/default/failing/manifests/v1"))[2])["layers"]
    path = f"/v2/default/failing/blobs/{layer['digest']}"
    whole, read = (await served(path))[2], os.pread

    def fails(fd: int, size: int, at: int) -> bytes:
        if at >= 2 << 20:
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, size, at)

    monkeypatch.setattr("services.builder.sending._is_cached", lambda fd, at: False)
    monkeypatch.setattr(os, "pread", fails)
    got = b""
    with pytest.raises(aiohttp.ClientPayloadError):
        async with served.session.get(f"{served.url}{path}", headers={"Authorization": "Bearer viewer"}) as answer:
            async for chunk in answer.content.iter_any():
                got += chunk
    assert got == whole[: 2 << 20]
    monkeypatch.undo()
    assert got + (await served(path, Range=f"bytes={len(got)}-"))[2] == whole


async def test_what_is_not_there_is_said_in_the_specifications_words(served: Served) -> None:
    await put_image(served.layout, "default/words:v1")
    for path, status, code in (
        ("/v2/default/words/manifests/v2", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/default/words/manifests/{ABSENT}", 404, "MANIFEST_UNKNOWN"),
        ("/v2/default/words/manifests/sha256:short", 400, "DIGEST_INVALID"),
        ("/v2/default/words/manifests/sha512:" + "0" * 128, 404, "MANIFEST_UNKNOWN"),
        (f"/v2/default/words/blobs/{ABSENT}", 404, "BLOB_UNKNOWN"),
        ("/v2/default/words/blobs/nonsense", 400, "DIGEST_INVALID"),
        ("/v2/default/other/manifests/v1", 404, "NAME_UNKNOWN"),
        ("/v2/default/other/tags/list", 404, "NAME_UNKNOWN"),
        ("/v2/Default/words/tags/list", 400, "NAME_INVALID"),
        ("/v2/default/words/tags/list?n=many", 400, "PAGINATION_NUMBER_INVALID"),
        ("/v2/default/words", 404, "NAME_UNKNOWN"),
        ("/v2/default/words/manifests/" + "x" * 500, 404, "MANIFEST_UNKNOWN"),
    ):
        assert await served.code(path, status) == code, path


async def test_nothing_is_written(served: Served) -> None:
    await put_image(served.layout, "default/fixed:v1")
    before = sorted(path.name for path in served.layout.rglob("*"))
    for method, path in (
        ("POST", "/v2/default/fixed/blobs/uploads/"),
        ("PUT", "/v2/default/fixed/manifests/v1"),
        ("PATCH", "/v2/default/fixed/blobs/uploads/1"),
        ("DELETE", "/v2/default/fixed/manifests/v1"),
        ("DELETE", f"/v2/default/fixed/blobs/{ABSENT}"),
    ):
        assert await served.code(path, 405, method) == "UNSUPPORTED"
        assert (await served(path, method))[1]["Allow"] == "GET, HEAD"
        assert await served.code(path, 401, method, token="") == "UNAUTHORIZED"
    assert sorted(path.name for path in served.layout.rglob("*")) == before


async def test_tags_come_in_order_and_in_pages(served: Served) -> None:
    image = await put_image(served.layout, "default/many:first")
    add_entries(
        served.layout,
        [
            {**image.to_json(), "annotations": {"org.opencontainers.image.ref.name": f"default/many:v{number}"}}
            for number in range(999)
        ]
        + [{**image.to_json(), "annotations": {"org.opencontainers.image.ref.name": "default/many:V5"}}],
    )
    listed = json.loads((await served("/v2/default/many/tags/list"))[2])
    assert (listed["name"], len(listed["tags"])) == ("default/many", 1001)
    assert listed["tags"] == sorted(listed["tags"], key=lambda tag: (tag.lower(), tag))
    assert listed["tags"][0] == "first" and abs(listed["tags"].index("V5") - listed["tags"].index("v5")) == 1
    path, found, pages = "/v2/default/many/tags/list?n=300", [], 0
    while path:
        _, headers, body = await served(path)
        found += json.loads(body)["tags"]
        pages += 1
        link = headers.get("Link", "")
        path = link.partition("<")[2].partition(">")[0]
    assert (found, pages) == (listed["tags"], 4)
    after = json.loads((await served("/v2/default/many/tags/list?last=v5"))[2])["tags"]
    assert after == listed["tags"][listed["tags"].index("v5") + 1 :]
    status, headers, body = await served("/v2/default/many/tags/list?n=0")
    assert (status, json.loads(body)["tags"], "Link" in headers) == (200, [], False)
    await put_image(served.layout, "default/more:v1")
    await put_image(served.layout, "other/hidden:v1")
    catalog = json.loads((await served("/v2/_catalog"))[2])
    assert catalog == {"repositories": ["default/many", "default/more"]}
    _, headers, body = await served("/v2/_catalog?n=1")
    assert json.loads(body) == {"repositories": ["default/many"]} and "last=default%2Fmany" in headers["Link"]


async def test_what_refers_to_an_image(served: Served) -> None:
    image = await put_image(served.layout, "default/signed:v1")
    await put_image(served.layout, "default/bare:v1")
    bill = await put_referrer(served.layout, image, "application/vnd.cyclonedx+json", b"bill")
    signature = await put_referrer(served.layout, image, "application/vnd.dev.sigstore.bundle.v0.3+json", b"signature")
    path = f"/v2/default/signed/referrers/{image.digest}"
    status, headers, body = await served(path)
    index = json.loads(body)
    assert (status, headers["Content-Type"], index["mediaType"]) == (200, INDEX, INDEX)
    assert {each["digest"] for each in index["manifests"]} == {str(bill.digest), str(signature.digest)}
    assert all(each["annotations"]["dev.ekiben.test"] == each["artifactType"] for each in index["manifests"])
    _, headers, body = await served(f"{path}?artifactType=application/vnd.cyclonedx%2Bjson")
    assert [each["digest"] for each in json.loads(body)["manifests"]] == [str(bill.digest)]
    assert headers["OCI-Filters-Applied"] == "artifactType"
    # They are pulled through the repository of what they refer to, and through no other.
    manifest = json.loads((await served(f"/v2/default/signed/manifests/{bill.digest}"))[2])
    assert (await served(f"/v2/default/signed/blobs/{manifest['layers'][0]['digest']}"))[2] == b"bill"
    assert await served.code(f"/v2/default/bare/manifests/{bill.digest}", 404) == "MANIFEST_UNKNOWN"
    nothing = json.loads((await served(f"/v2/default/signed/referrers/{ABSENT}"))[2])
    assert nothing["manifests"] == []
    assert await served.code("/v2/default/signed/referrers/sha256:no", 400) == "DIGEST_INVALID"


async def test_an_image_is_copied_away_with_its_attachments_by_the_platforms_own_client(
    served: Served, tmp_path: Path
) -> None:
    image = await put_image(served.layout, "default/copied:v1", {"weights": os.urandom(3 << 20)})
    bill = await put_referrer(served.layout, image, "application/vnd.cyclonedx+json", b"bill")
    host = served.url.removeprefix("http://")
    login = base64.b64encode(b"somebody:viewer").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
    options = RegistryOptions(login_files=(tmp_path / "config.json",), insecure=frozenset({host}), attempts=2)
    into = LayoutImageStore(tmp_path / "copy")
    async with open_registry(f"{host}/default/copied:v1", options) as (store, tag):
        assert (await store.references(), tag) == (["v1"], "v1")
        assert (await copy_image(store, tag, into, "copy")).digest == image.digest
    assert [each.digest for each in await into.referrers(image.digest)] == [bill.digest]
    async with open_registry(f"{host}/default/copied:v2", options) as (store, tag):
        with pytest.raises(NotFound, match="has no image 'v2'"):
            await store.find(tag)


async def test_an_image_for_several_platforms(served: Served) -> None:
    amd, arm = Platform("linux", "amd64"), Platform("linux", "arm64")
    images = {str(each): await put_image(served.layout, "", platform=each) for each in (amd, arm)}
    index = await put_index(served.layout, "default/both:v1", images)
    _, headers, body = await served("/v2/default/both/manifests/v1")
    assert (headers["Content-Type"], headers["Docker-Content-Digest"]) == (INDEX, str(index.digest))
    for each in json.loads(body)["manifests"]:
        assert (await served(f"/v2/default/both/manifests/{each['digest']}"))[0] == 200
    # A reference that names an image for each of two platforms is shown as an index of both.
    for platform in (amd, arm):
        await put_image(served.layout, "default/pair:v1", platform=platform)
    _, headers, body = await served("/v2/default/pair/manifests/v1")
    assert headers["Docker-Content-Digest"] == str(digest_of(body))
    assert [each["platform"]["architecture"] for each in json.loads(body)["manifests"]] == ["amd64", "arm64"]
    assert (await served(f"/v2/default/pair/manifests/{digest_of(body)}"))[2] == body


async def test_only_who_has_a_token_of_the_organization_sees_its_images(served: Served) -> None:
    image = await put_image(served.layout, "default/private:v1")
    status, headers, _ = await served("/v2/", token="")
    assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="ekiben"')
    assert served.tokens.written == []  # How every engine begins.
    assert (await served("/v2/"))[0] == (await served("/v2"))[0] == 200
    bearer = {"Authorization": "Bearer viewer"}
    assert (await served("/v2/default/private/tags/list", token="", **bearer))[0] == 200
    for sent in ("Bearer wrong", "Basic ???", "Basic " + base64.b64encode(b"ada:wrong").decode(), "Bearer \xe4"):
        assert (await served("/v2/", token="", Authorization=sent))[0] == 401
    assert await served.code("/v2/default/private/tags/list", 403, token="nobody") == "DENIED"
    refused = [(entry.method, entry.outcome, entry.user) for entry in served.tokens.written]
    assert refused[0] == ("oci.distribution/Pull", "UNAUTHENTICATED", "")
    assert refused[-1] == ("oci.distribution/Pull", "PERMISSION_DENIED", "users/nil")
    assert not any("wrong" in repr(entry) for entry in served.tokens.written)
    for path in ("tags/list", "manifests/v1", f"manifests/{image.digest}", f"referrers/{image.digest}"):
        assert await served.code(f"/v2/default/private/{path}", 404, token="stranger") == "NAME_UNKNOWN"
    assert json.loads((await served("/v2/_catalog", token="stranger"))[2]) == {"repositories": []}
    del served.tokens.principals["viewer"]
    assert await served.code(f"/v2/default/private/manifests/{image.digest}", 401) == "UNAUTHORIZED"
    served.tokens.away = True
    status, headers, _ = await served("/v2/")
    assert (status, headers["Retry-After"]) == (503, "1")


async def test_a_blob_belongs_to_the_repositories_that_use_it(served: Served) -> None:
    content = os.urandom(100)
    await put_image(served.layout, "default/one:v1", {"model": content})
    await put_image(served.layout, "default/two:v1", {"model": content}, config={"Env": ["A=B"]})
    await put_image(served.layout, "default/three:v1")
    loose = await put_blob(served.layout, os.urandom(10), "application/octet-stream")
    (layer,) = json.loads((await served("/v2/default/one/manifests/v1"))[2])["layers"]
    assert (await served(f"/v2/default/one/blobs/{layer['digest']}"))[0] == 200
    assert (await served(f"/v2/default/two/blobs/{layer['digest']}"))[0] == 200
    assert await served.code(f"/v2/default/three/blobs/{layer['digest']}", 404) == "BLOB_UNKNOWN"
    assert await served.code(f"/v2/default/one/blobs/{loose.digest}", 404) == "BLOB_UNKNOWN"


async def test_what_is_damaged_is_told_and_nothing_else_suffers(served: Served) -> None:
    await put_image(served.layout, "default/sound:v1")
    image = await put_image(served.layout, "default/broken:v1")
    (layer,) = json.loads((await served("/v2/default/broken/manifests/v1"))[2])["layers"]
    blobs = served.layout / "blobs" / "sha256"
    file = blobs / layer["digest"].partition(":")[2]
    file.write_bytes(file.read_bytes()[:-1])
    assert await served.code(f"/v2/default/broken/blobs/{layer['digest']}", 500) == "UNKNOWN"
    file.unlink()
    assert await served.code(f"/v2/default/broken/blobs/{layer['digest']}", 404) == "BLOB_UNKNOWN"
    manifest = blobs / image.digest.hex
    manifest.write_bytes(manifest.read_bytes() + b" ")
    assert await served.code("/v2/default/broken/manifests/v1", 500) == "UNKNOWN"
    manifest.unlink()
    assert await served.code("/v2/default/broken/manifests/v1", 404) == "MANIFEST_UNKNOWN"
    # An index that another tool is writing just now: what was there before is served.
    whole = (served.layout / "index.json").read_bytes()
    (served.layout / "index.json").write_bytes(whole[: len(whole) // 2])
    assert (await served("/v2/default/sound/manifests/v1"))[0] == 200
    (served.layout / "index.json").write_bytes(whole)
    assert (await served("/v2/default/sound/manifests/v1"))[0] == 200


async def test_manifests_that_are_none_harm_nobody(served: Served) -> None:
    await put_image(served.layout, "default/odd:sound")
    for number, content in enumerate(
        (
            b"[" * 100_000,
            b"[]",
            b"not JSON",
            b'{"config": 1, "layers": "many", "manifests": {"digest": 1}, "subject": [1], "mediaType": ["a"]}',
            b'{"mediaType": "text/html\\r\\nSet-Cookie: a=b", "layers": [{"digest": "sha512:aa", "size": 1}]}',
            b'{"config": {"digest": "sha256:no"}, "annotations": [1], "subject": {"digest": "%s", "size": 1}}'
            % ABSENT.encode(),
        )
    ):
        found = await put_blob(served.layout, content, MANIFEST)  # A layout's own `tag` would refuse most of them.
        add_entries(served.layout, [{**found.to_json(), "annotations": {REF_NAME: f"default/odd:t{number}"}}])
        status, headers, body = await served(f"/v2/default/odd/manifests/t{number}")
        assert (status, body, "Set-Cookie" in headers) == (200, content, False)
        assert headers["Content-Type"] in (MANIFEST, "application/octet-stream")
    assert (await served("/v2/default/odd/manifests/sound"))[0] == 200
    assert len(json.loads((await served("/v2/default/odd/tags/list"))[2])["tags"]) == 7
    for path in ("/v2/default/../odd/tags/list", "/v2/default/%2e%2e/odd/tags/list", "/v2/default/odd%00/tags/list"):
        assert (await served(path))[0] in (400, 404)


async def test_what_a_build_is_still_at_has_no_tag(served: Served) -> None:
    image = await put_image(served.layout, "default/half:v1")
    await put_image(served.layout, "default/half:BUILD-b1")
    assert json.loads((await served("/v2/default/half/tags/list"))[2])["tags"] == ["v1"]
    assert await served.code("/v2/default/half/manifests/BUILD-b1", 404) == "MANIFEST_UNKNOWN"
    assert (await served(f"/v2/default/half/manifests/{image.digest}"))[0] == 200


async def test_an_image_is_seen_as_soon_as_it_is_tagged_and_no_earlier(served: Served) -> None:
    """Builds and pulls at once: whatever tag is listed can be pulled whole."""

    async def whole(tag: str) -> None:
        status, _, body = await served(f"/v2/default/busy/manifests/{tag}")
        assert status == 200
        for descriptor in [json.loads(body)["config"], *json.loads(body)["layers"]]:
            assert (await served(f"/v2/default/busy/blobs/{descriptor['digest']}"))[0] == 200

    async def build() -> None:
        for number in range(20):
            await put_image(served.layout, f"default/busy:v{number}")

    building = asyncio.create_task(build())
    seen: set[str] = set()
    while len(seen) < 20:
        status, _, body = await served("/v2/default/busy/tags/list")
        listed = set(json.loads(body)["tags"]) if status == 200 else set()
        assert seen <= listed
        for tag in listed - seen:
            await whole(tag)
        seen = listed
    await building


async def test_an_empty_layout_has_nothing(served: Served) -> None:
    assert json.loads((await served("/v2/_catalog"))[2]) == {"repositories": []}
    assert await served.code("/v2/default/any/manifests/v1", 404) == "NAME_UNKNOWN"
    store = LayoutImageStore(served.layout)
    assert await store.size(digest_of(b"")) is None
    # A reference without a repository, as `ekiben images build` writes, is in none.
    image: Descriptor = await put_image(served.layout, "v1")
    assert await served.code(f"/v2/default/v1/manifests/{image.digest}", 404) == "NAME_UNKNOWN"


async def test_a_token_to_pull_with_gives_one_organizations_images_for_a_while_and_nothing_else(served: Served) -> None:
    await put_image(served.layout, "default/nodes:v1")
    token, ends = served.pull_tokens.give("organizations/default", timedelta(hours=1))
    assert ends == served.clock.now() + timedelta(hours=1)
    assert (await served("/v2/default/nodes/manifests/v1", token=token))[0] == 200
    assert await served.code("/v2/default/nodes/manifests/v1", 405, "PUT", token=token) == "UNSUPPORTED"
    other, _ = served.pull_tokens.give("organizations/other")
    assert await served.code("/v2/default/nodes/manifests/v1", 404, token=other) == "NAME_UNKNOWN"
    for wrong in (f"{token[:-2]}AA", PullTokens("eks_another", served.clock).give("organizations/default")[0], "ekp_"):
        assert await served.code("/v2/default/nodes/manifests/v1", 401, token=wrong) == "UNAUTHORIZED"
    await served.clock.advance(3600)
    assert await served.code("/v2/default/nodes/manifests/v1", 401, token=token) == "UNAUTHORIZED"
    assert not any(token in repr(entry) for entry in served.tokens.written)
    for lifetime in (timedelta(), timedelta(days=31)):
        with pytest.raises(InvalidArgument, match="at most 30 days"):
            served.pull_tokens.give("organizations/default", lifetime)
