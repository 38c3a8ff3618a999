"""The HTTP front over real sockets: the transcoder, its errors and streams, and the pages."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from ekiben.deployer.v1 import deployer_pb2 as deployer
from tests.fixtures_http import Front, front

__all__ = ["front"]


@pytest.fixture
async def api(front: Front) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client with the admin's token."""
    async with aiohttp.ClientSession(front.url, headers=front.headers) as session:
        yield session


async def ask(api: aiohttp.ClientSession, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
    """Status, parsed body and headers."""
    async with api.request(method, path, **options) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text else None, answer.headers


async def test_a_resource_is_created_read_changed_and_deleted(api: aiohttp.ClientSession) -> None:
    repository = {"name": "modelRepositories/iris", "description": "flowers", "labels": {"team": "x"}}
    status, made, headers = await ask(api, "POST", "/v1/modelRepositories", json=repository)
    assert (status, made["description"], headers["Content-Type"]) == (200, "flowers", "application/json")
    status, read, _ = await ask(api, "GET", "/v1/modelRepositories/iris")
    assert (status, read) == (200, made)
    status, changed, _ = await ask(
        api, "PATCH", "/v1/modelRepositories/iris?updateMask=description", json={"description": "plants"}
    )
    assert (status, changed["description"], changed["labels"]) == (200, "plants", {"team": "x"})
    status, listed, _ = await ask(api, "GET", "/v1/modelRepositories?pageSize=1&filter=")
    assert (status, len(listed["modelRepositories"]), listed["totalSize"]) == (200, 1, 1)
    status, nothing, _ = await ask(api, "DELETE", "/v1/modelRepositories/iris")
    assert (status, nothing) == (200, {})
    status, problem, headers = await ask(api, "GET", "/v1/modelRepositories/iris")
    assert (status, problem["reason"]) == (404, "MODEL_REPOSITORY_NOT_FOUND")
    assert headers["Content-Type"] == "application/problem+json"
    assert problem["instance"].startswith("urn:")


async def test_answers_are_for_nobodys_cache_and_pages_may_be(api: aiohttp.ClientSession) -> None:
    for path in ("/v1/caller", "/v1/nothing", "/api/v1/auth/code", "/api/v1/auth/token?code=x", "/api_tokens?code=x"):
        async with api.get(path) as answer:
            assert answer.headers["Cache-Control"] == "no-store", path
    async with api.get("/static/page.css") as answer:
        assert "Cache-Control" not in answer.headers


async def test_a_stale_etag_is_a_conflict(api: aiohttp.ClientSession) -> None:
    await ask(api, "POST", "/v1/modelRepositories", json={"name": "modelRepositories/iris"})
    status, problem, _ = await ask(
        api, "PATCH", "/v1/modelRepositories/iris", json={"description": "x", "etag": '"stale"'}
    )
    assert (status, problem["reason"]) == (409, "ETAG_MISMATCH")


@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic x"}, {"Authorization": "Bearer "}])
async def test_no_token_is_401_and_never_the_gateways_own(front: Front, header: dict[str, str]) -> None:
    async with aiohttp.ClientSession(front.url, headers=header) as session:
        for path in ("/v1/caller", "/v1/modelRepositories", "/v1/auditEntries", "/api/v1/auth/current"):
            status, body, headers = await ask(session, "GET", path)
            assert status == 401, path
            assert "services/" not in json.dumps(body)
            assert headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("token", ["ekb_" + "x" * 40, "x", "\u00e9", "a b", "x" * 5000])
async def test_an_unknown_token_is_401(front: Front, token: str) -> None:
    async with aiohttp.ClientSession(front.url) as session:
        for header in ({"Authorization": f"Bearer {token}"}, {"X-YATAI-API-TOKEN": token}):
            status, problem, _ = await ask(session, "GET", "/v1/caller", headers=header)
            assert (status, problem["code"]) == (401, "UNAUTHENTICATED")


async def test_a_viewer_reads_and_does_not_write(front: Front, api: aiohttp.ClientSession) -> None:
    _, token, _ = await ask(api, "POST", "/v1/apiTokens", json={"displayName": "v", "role": "ROLE_VIEWER"})
    async with aiohttp.ClientSession(front.url, headers={"X-YATAI-API-TOKEN": token["token"]}) as viewer:
        assert (await ask(viewer, "GET", "/v1/modelRepositories"))[0] == 200
        status, problem, _ = await ask(viewer, "POST", "/v1/modelRepositories", json={"name": "modelRepositories/x"})
        assert (status, problem["reason"]) == (403, "ROLE_TOO_LOW")
        status, body, _ = await ask(viewer, "POST", "/api/v1/model_repositories", json={"name": "x", "description": ""})
        assert (status, set(body)) == (403, {"error"})
    assert (await ask(api, "GET", "/v1/modelRepositories/x"))[0] == 404


async def test_the_audit_log_knows_peer_and_request(api: aiohttp.ClientSession) -> None:
    headers = {"X-Request-Id": "my-own-id", "X-Forwarded-For": "1.1.1.1, 10.9.8.7"}
    _, _, got = await ask(api, "POST", "/v1/modelRepositories", json={"name": "modelRepositories/a"}, headers=headers)
    assert got["X-Request-Id"] == "my-own-id"
    _, entries, _ = await ask(api, "GET", "/v1/auditEntries")
    (entry,) = [e for e in entries["auditEntries"] if e["requestId"] == "my-own-id"]
    assert (entry["peer"], entry["user"], entry["outcome"]) == ("10.9.8.7", "users/admin", "OK")


async def test_http_refusals_are_problems(api: aiohttp.ClientSession) -> None:
    status, problem, _ = await ask(api, "GET", "/v1/nothing")
    assert (status, problem["reason"]) == (404, "PATH_UNKNOWN")
    status, problem, headers = await ask(api, "PUT", "/v1/modelRepositories/iris")
    assert (status, headers["Allow"]) == (405, "DELETE, GET, HEAD, PATCH")
    status, problem, headers = await ask(api, "DELETE", "/docs")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    status, problem, _ = await ask(api, "POST", "/v1/modelRepositories", data={"name": "x"})
    assert (status, problem["reason"], problem["status"]) == (415, "MEDIA_TYPE_UNSUPPORTED", 415)
    status, problem, _ = await ask(api, "POST", "/v1/modelRepositories", json={"description": "x" * (9 << 20)})
    assert (status, problem["reason"]) == (413, "BODY_TOO_LARGE")
    assert "8 MiB" in problem["detail"]
    status, problem, _ = await ask(
        api, "POST", "/v1/modelRepositories", data=b'{"name":', headers={"Content-Type": "application/json"}
    )
    assert (status, problem["reason"]) == (400, "JSON_MALFORMED")
    for method in ("GET", "POST", "DELETE", "PATCH"):
        status, body, _ = await ask(api, method, "/api/v1/nothing")
        assert (status, set(body)) == (404, {"error"})
    status, body, _ = await ask(api, "POST", "/api/v1/bento_repositories", data=b"{" * 3)
    assert (status, set(body)) == (400, {"error"})


async def test_no_path_redirects(api: aiohttp.ClientSession) -> None:
    for path in ("/v1/modelRepositories/", "/api/v1/models/", "/docs/", "/api//v1/models", "/v1"):
        status, _, _ = await ask(api, "GET", path, allow_redirects=False)
        assert status == 404, path


async def test_head_answers_as_get_without_a_body(api: aiohttp.ClientSession) -> None:
    async with api.head("/v1/modelRepositories") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 0


async def test_a_stream_gives_each_message_at_once_and_its_error_last(front: Front, api: aiohttp.ClientSession) -> None:
    front.deployments.kept["deployments/web"] = deployer.Deployment(name="deployments/web")
    async with api.get("/v1/deployments/web:logs?follow=true") as answer, asyncio.timeout(10):
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/x-ndjson")
        for text in ("one", "zwölf"):
            front.deployments.log.put_nowait(text)
            assert json.loads(await answer.content.readline()) == {"text": text}
        front.deployments.log.put_nowait(None)
        assert await answer.content.read() == b""
    status, problem, _ = await ask(api, "GET", "/v1/deployments/none:logs")
    assert (status, problem["reason"]) == (404, "DEPLOYMENT_NOT_FOUND")


async def test_an_error_in_a_stream_is_its_last_line(front: Front, api: aiohttp.ClientSession) -> None:
    front.deployments.kept["deployments/web"] = deployer.Deployment(name="deployments/web")
    async with api.get("/v1/deployments/web:logs") as answer, asyncio.timeout(10):
        front.deployments.log.put_nowait("one")
        await answer.content.readline()
        front.deployments.log.put_nowait(7)  # type: ignore[arg-type]
        problem = json.loads(await answer.content.readline())["error"]
        assert (problem["status"], problem["code"]) == (500, "INTERNAL")
        assert await answer.content.read() == b""


async def test_a_client_that_leaves_ends_the_call(front: Front, api: aiohttp.ClientSession) -> None:
    front.deployments.kept["deployments/web"] = deployer.Deployment(name="deployments/web")
    async with api.get("/v1/deployments/web:logs?follow=true") as answer:
        front.deployments.log.put_nowait("one")
        await answer.content.readline()
        answer.close()
    async with asyncio.timeout(10):
        await front.deployments.log_ended.wait()


async def test_readiness_names_the_part_that_is_not_ready(front: Front, api: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(10):
        while (await ask(api, "GET", "/readyz"))[0] != 200:
            pass  # each look is a round trip
    front.unready = "Envoy does not run yet."
    status, body, _ = await ask(api, "GET", "/readyz")
    assert (status, body["ready"], body["components"]["envoy"]) == (503, False, "Envoy does not run yet.")
    assert body["components"]["registry"] == "ready"
    assert (await ask(api, "GET", "/livez"))[0] == 200
    assert (await ask(api, "GET", "/healthz"))[0] == 200


async def test_a_login_is_approved_on_its_page_once(front: Front) -> None:
    async with aiohttp.ClientSession(front.url) as browser:
        _, opened, _ = await ask(browser, "GET", "/api/v1/auth/code")
        code = opened["code"]
        assert (await ask(browser, "GET", f"/api/v1/auth/token?code={code}"))[0] >= 400
        async with browser.get(f"/api_tokens?code={code}") as page:
            assert (page.status, code in await page.text()) == (200, True)
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        async with browser.post("/api_tokens", data={"code": code, "token": "wrong"}) as page:
            assert page.status == 401
        async with browser.post("/api_tokens", data={"code": code}) as page:
            assert page.status == 400
        async with browser.post("/api_tokens", data={"code": code, "token": front.token}) as page:
            assert (page.status, "Approved" in await page.text()) == (200, True)
        status, redeemed, _ = await ask(browser, "GET", f"/api/v1/auth/token?code={code}")
        assert status == 200
        assert (await ask(browser, "GET", f"/api/v1/auth/token?code={code}"))[0] >= 400
        headers = {"X-YATAI-API-TOKEN": redeemed["token"]}
        assert (await ask(browser, "GET", "/api/v1/auth/current", headers=headers))[1]["name"] == "admin"


async def test_pages_are_self_contained_and_escape_what_they_show(front: Front) -> None:
    async with aiohttp.ClientSession(front.url) as browser:
        for path in ("/", "/docs", "/deployments/x", "/codespaces/x", "/api_tokens", "/static/docs.js"):
            async with browser.get(path) as page:
                text = await page.text()
                assert page.status == 200, path
                assert "https://" not in text.replace(front.url, ""), path
        async with browser.get("/api_tokens", params={"code": '"><script>alert(1)</script>'}) as page:
            assert "<script>alert" not in await page.text()
        for path in ("/static/../pages.py", "/static/pages.py", "/static/nothing.css", "/static/%2e%2e%2fpages.py"):
            assert (await ask(browser, "GET", path))[0] == 404


async def test_the_api_describes_itself(front: Front) -> None:
    async with aiohttp.ClientSession(front.url) as browser:
        status, document, _ = await ask(browser, "GET", "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0")
    get_model = document["paths"]["/v1/modelRepositories/{repository}/models/{model}"]["get"]
    assert "latest" in get_model["description"]
    assert [parameter["name"] for parameter in get_model["parameters"]] == ["repository", "model"]
    assert document["paths"]["/v1/logins"]["post"]["security"] == []
    assert not [name for name, schema in document["components"]["schemas"].items() if not schema.get("description")
                and not name.startswith("google.")]  # fmt: skip
