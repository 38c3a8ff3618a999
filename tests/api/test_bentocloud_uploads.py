"""Uploads of the wire protocol that go wrong: what was there before stays, and nobody is told that it went well."""

import asyncio
import io
import json
import tarfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.gateway.bentocloud import uploads as gateway_uploads
from services.registry import listings
from tests.fixtures_http import Front, front, running_front
from tests.fixtures_registry import until

__all__ = ["front"]

X = "/api/v1/bento_repositories/iris/bentos/v1"
MANIFEST = {"service": "s:Svc", "bentoml_version": "1.4.39", "size_bytes": 3, "entry_service": "Svc"}


def archive(**files: str) -> bytes:
    """A bento's tar as the client makes it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, text in {"bento.yaml": "service: s:Svc\n", **files}.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


class Wire:
    """A client of the wire protocol, word by word."""

    def __init__(self, front: Front, session: aiohttp.ClientSession) -> None:
        self.front = front
        self.session = session

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and parsed body."""
        data = None if body is None else json.dumps(body)
        async with self.session.request(method, path, data=data, headers={"Content-Type": "application/json"}) as got:
            return got.status, await got.json()

    async def register(self, **manifest: Any) -> dict[str, Any]:
        """Repository and version, without bytes."""
        await self.ask("POST", "/api/v1/bento_repositories", {"name": "iris", "description": ""})
        body = {"version": "v1", "description": "", "manifest": {**MANIFEST, **manifest}, "labels": [],
                "build_at": "2026-01-02 03:04:05.000006"}  # fmt: skip
        status, made = await self.ask("POST", "/api/v1/bento_repositories/iris/bentos", body)
        assert status == 200, made
        return dict(made)

    async def put(self, url: str, data: bytes) -> tuple[int, str, str]:
        """PUT to a presigned URL, as the client does: no token, no content type."""
        async with aiohttp.ClientSession() as stranger:
            async with stranger.put(url, data=data, skip_auto_headers=["Content-Type"]) as got:
                return got.status, await got.text(), got.headers.get("ETag", "")

    async def push(self, data: bytes) -> tuple[int, Any]:
        """A whole upload by one PUT."""
        _, signed = await self.ask("PATCH", f"{X}/presign_upload_url")
        await self.ask("PATCH", f"{X}/start_upload")
        status, text, _ = await self.put(signed["presigned_upload_url"], data)
        finish = {"status": "success", "reason": ""} if status == 200 else {"status": "failed", "reason": text}
        return await self.ask("PATCH", f"{X}/finish_upload", finish)

    async def status(self) -> tuple[str, str]:
        """Upload status and why."""
        _, bento = await self.ask("GET", X)
        return bento["upload_status"], bento["upload_finished_reason"]

    async def content(self) -> bytes:
        """The archive that a pull would get."""
        status, signed = await self.ask("PATCH", f"{X}/presign_download_url")
        assert status == 200, signed
        async with aiohttp.ClientSession() as stranger, stranger.get(signed["presigned_download_url"]) as got:
            assert got.status == 200
            return await got.read()


@pytest.fixture
async def wire(front: Front) -> AsyncIterator[Wire]:
    async with aiohttp.ClientSession(front.url, headers={"X-YATAI-API-TOKEN": front.token}) as session:
        yield Wire(front, session)


async def test_a_push_is_visible_once_it_is_whole(wire: Wire) -> None:
    made = await wire.register()
    assert (made["upload_status"], made["transmission_strategy"], made["build_at"]) == (
        "pending", None, "2026-01-02T03:04:05.000006Z",
    )  # fmt: skip
    assert (await wire.push(archive()))[0] == 200
    assert await wire.status() == ("success", "")
    assert await wire.content() == archive()


async def test_success_without_bytes_is_not_believed(wire: Wire) -> None:
    await wire.register()
    status, body = await wire.ask("PATCH", f"{X}/finish_upload", {"status": "success", "reason": ""})
    assert (status, set(body)) == (400, {"error"})
    await wire.ask("PATCH", f"{X}/presign_upload_url")
    await wire.ask("PATCH", f"{X}/start_upload")
    status, _ = await wire.ask("PATCH", f"{X}/finish_upload", {"status": "success", "reason": ""})
    assert status == 400
    assert (await wire.status())[0] != "success"


@pytest.mark.parametrize("bad", [b"", b"no tar at all", archive()[:700], archive(**{"../evil": "x"})])
async def test_a_bad_archive_is_refused_in_words_and_what_was_there_stays(wire: Wire, bad: bytes) -> None:
    await wire.register()
    await wire.push(archive())
    _, signed = await wire.ask("PATCH", f"{X}/presign_upload_url")
    status, text, _ = await wire.put(signed["presigned_upload_url"], bad)
    assert status >= 400
    assert 0 < len(text) < 600
    status, body = await wire.ask("PATCH", f"{X}/finish_upload", {"status": "success", "reason": ""})
    assert status == 400, body
    status, body = await wire.ask("PATCH", f"{X}/finish_upload", {"status": "failed", "reason": text})
    assert status == 200
    assert (await wire.status())[0] == "success"
    assert await wire.content() == archive()


async def test_parts_are_joined_and_a_missing_one_is_refused(wire: Wire) -> None:
    await wire.register()
    await wire.push(archive())
    whole = archive(more="x" * 4000)
    pieces = [whole[:3000], whole[3000:7000], whole[7000:]]

    async def start() -> str:
        await wire.ask("PATCH", f"{X}/start_upload")
        _, started = await wire.ask("PATCH", f"{X}/start_multipart_upload")
        return str(started["upload_id"])

    async def part(upload_id: str, number: int) -> dict[str, Any]:
        body = {"upload_id": upload_id, "part_number": number}
        status, signed = await wire.ask("PATCH", f"{X}/presign_multipart_upload_url", body)
        assert status == 200, signed
        status, text, etag = await wire.put(signed["presigned_upload_url"], pieces[number - 1])
        assert (status, bool(etag)) == (200, True), text
        return {"part_number": number, "etag": etag}

    async def complete(upload_id: str, parts: list[dict[str, Any]]) -> int:
        body = {"upload_id": upload_id, "parts": parts}
        return (await wire.ask("PATCH", f"{X}/complete_multipart_upload", body))[0]

    upload_id = await start()
    assert upload_id
    first, second, third = await asyncio.gather(*(part(upload_id, number) for number in (1, 2, 3)))
    assert await complete(upload_id, []) == 400
    assert await complete(upload_id, [first, {**second, "etag": '"other"'}, third]) == 400
    assert await complete("unknown", [first]) == 404
    status, _ = await wire.ask("PATCH", f"{X}/finish_upload", {"status": "success", "reason": ""})
    assert status == 400
    assert await wire.content() == archive()
    assert await complete(upload_id, [third, first, second]) == 200
    assert (await wire.ask("PATCH", f"{X}/finish_upload", {"status": "success", "reason": ""}))[0] == 200
    assert await wire.content() == whole

    upload_id = await start()  # a part fails at the client, which completes all the same and then says failed
    alone = await part(upload_id, 2)
    assert await complete(upload_id, [alone]) == 400
    status, _ = await wire.ask("PATCH", f"{X}/finish_upload", {"status": "failed", "reason": "part 1 was lost"})
    assert status == 200
    assert await wire.content() == whole


async def test_a_client_is_not_kept_waiting_for_a_long_check(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives any request a minute, and the registry may have to read many gigabytes back."""
    gate, real = threading.Event(), listings.check_archive

    def slow(file: Any, kind: Any) -> None:
        assert gate.wait(60)
        real(file, kind)

    monkeypatch.setattr(listings, "check_archive", slow)
    monkeypatch.setattr(gateway_uploads, "_PATIENCE_S", 0.3)
    await wire.register()
    _, started = await wire.ask("PATCH", f"{X}/start_multipart_upload")
    part = {"upload_id": started["upload_id"], "part_number": 1}
    _, signed = await wire.ask("PATCH", f"{X}/presign_multipart_upload_url", part)
    _, _, etag = await wire.put(signed["presigned_upload_url"], archive())
    body = {"upload_id": started["upload_id"], "parts": [{"part_number": 1, "etag": etag}]}
    assert (await wire.ask("PATCH", f"{X}/complete_multipart_upload", body))[0] == 200
    assert (await wire.ask("PATCH", f"{X}/finish_upload", {"status": "success", "reason": ""}))[0] == 200
    assert (await wire.status())[0] == "uploading"
    gate.set()

    async def there() -> bool:
        return (await wire.status())[0] == "success"

    await until(there, 30)
    assert await wire.content() == archive()


async def test_a_failed_first_push_says_why(wire: Wire) -> None:
    await wire.register()
    await wire.ask("PATCH", f"{X}/presign_upload_url")
    await wire.ask("PATCH", f"{X}/finish_upload", {"status": "failed", "reason": "the cable was cut"})
    assert await wire.status() == ("failed", "the cable was cut")
    assert (await wire.push(archive()))[0] == 200
    assert await wire.status() == ("success", "")


async def test_a_bento_under_development_has_no_bytes(wire: Wire) -> None:
    await wire.register(dev=True)
    body = {"status": "success", "reason": "bento for development"}
    status, bento = await wire.ask("PATCH", f"{X}/finish_upload", body)
    assert (status, bento["upload_status"]) == (200, "success")


async def test_a_model_of_a_hub_has_no_bytes(wire: Wire) -> None:
    await wire.ask("POST", "/api/v1/model_repositories", {"name": "llama", "description": ""})
    manifest = {"module": "", "api_version": "v1", "bentoml_version": "1.4.39", "size_bytes": 0,
                "metadata": {"registry": "huggingface"}}  # fmt: skip
    body = {"version": "abc", "description": "", "manifest": manifest, "labels": []}
    status, model = await wire.ask("POST", "/api/v1/model_repositories/llama/models", body)
    assert (status, model["upload_status"]) == (200, "success"), model
    status, model = await wire.ask("PATCH", "/api/v1/model_repositories/llama/models/abc/presign_download_url")
    assert (status, model["presigned_download_url"]) == (200, "")
    assert model["manifest"]["metadata"]["registry"] == "huggingface"


async def test_the_manifest_is_returned_as_it_was_sent(wire: Wire) -> None:
    sent = {"schema": {"z": [1.5, None, {"é": "\u2028"}], "a": 1e300}, "name": "iris", "version": "v1", "image": None}
    made = await wire.register(**sent)
    assert made["manifest"] == {**MANIFEST, **sent}
    status, updated = await wire.ask("PATCH", X, {"manifest": {**MANIFEST, "name": "iris", "version": "v1"}})
    assert (status, updated["manifest"]) == (200, {**MANIFEST, "name": "iris", "version": "v1"})
    status, updated = await wire.ask("PATCH", X, {"description": "read me", "labels": None, "manifest": None})
    assert (status, updated["description"], updated["manifest"]["name"]) == (200, "read me", "iris")


async def test_a_proxied_upload_is_whole_or_nothing(tmp_path: Path) -> None:
    async with running_front(tmp_path / "data", upload_strategy="proxy") as front:
        async with aiohttp.ClientSession(front.url, headers={"X-YATAI-API-TOKEN": front.token}) as session:
            wire = Wire(front, session)
            assert (await wire.register())["transmission_strategy"] == "proxy"
            async with session.put(f"{X}/upload", data=archive()) as got:
                assert got.status == 200, await got.text()
            async with session.get(f"{X}/download") as got:
                assert (got.status, await got.read()) == (200, archive())
                assert int(got.headers["Content-Length"]) == len(archive())
            async with session.put(f"{X}/upload", data=b"no tar") as got:
                assert got.status == 400
                assert "error" in await got.json()

            async def endless() -> AsyncIterator[bytes]:
                yield b"x" * 100
                raise RuntimeError("the client dies")

            with pytest.raises((aiohttp.ClientError, RuntimeError)):
                await session.put(f"{X}/upload", data=endless(), headers={"Content-Length": "5000"})
            with pytest.raises((aiohttp.ClientError, RuntimeError)):
                await session.put(f"{X}/upload", data=endless())
            async with session.get(f"{X}/download") as got:
                assert await got.read() == archive()
            async with asyncio.timeout(10):
                while (await wire.ask("GET", X))[1]["upload_status"] != "success":
                    pass


async def test_a_manifest_of_20_mb_is_refused_in_a_sentence(wire: Wire) -> None:
    body = {"version": "v1", "manifest": {"x": "y" * (20 << 20)}}
    status, answer = await wire.ask("POST", "/api/v1/bento_repositories/iris/bentos", body)
    assert (status, "8 MiB" in answer["error"]) == (413, True)
    body = {"version": "v1", "manifest": {"x": "y" * (5 << 20)}}
    status, answer = await wire.ask("POST", "/api/v1/bento_repositories/iris/bentos", body)
    assert (status, "error" in answer) == (400, True)


@pytest.mark.parametrize("name", ["x" * 300, "UPPER", "a/b", "..", "a b", "é"])
async def test_a_bad_name_is_refused(wire: Wire, name: str) -> None:
    status, answer = await wire.ask("POST", "/api/v1/bento_repositories", {"name": name, "description": ""})
    assert (status, "error" in answer) == (400, True)
    assert len(answer["error"]) < 400
