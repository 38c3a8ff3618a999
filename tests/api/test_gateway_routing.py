"""Which request reaches which replica, and as what, through a real Envoy."""

import json
import socket

import aiohttp
from aiohttp import web

from services.gateway import messages
from services.gateway.settings import Settings
from tests.fixtures_gateway import Plane, client, echo, free_port, gateway_settings, open_plane, plane, route, serve

__all__ = ["client", "gateway_settings", "plane"]


async def test_what_is_no_deployment_goes_to_the_http_front_and_what_callers_say_of_themselves_does_not(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    lies = {
        "ekiben-user": "users/admin",
        "x-forwarded-host": "evil",
        "x-request-id": "mine",
        "x-forwarded-for": "1.2.3.4",
    }
    async with client.get(plane.url + "/v1/models?page_size=1", headers=lies) as answer:
        got = await answer.json()
    sent = {name.lower(): value for name, value in got["headers"].items()}
    assert got["front"] == "/v1/models?page_size=1"
    assert sent["host"] == f"127.0.0.1:{plane.settings.port}"
    assert "ekiben-user" not in sent
    assert "x-forwarded-host" not in sent
    assert "1.2.3.4" not in sent["x-forwarded-for"]
    assert sent["x-request-id"] != "mine"
    assert answer.headers["x-request-id"] == sent["x-request-id"]


async def test_a_deployment_is_reached_by_its_host_with_and_without_port_and_by_its_own_port(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    own = free_port()
    async with serve(echo) as address:
        await plane.deployer.publish(route("iris", address, port=own))
        for url, host in (
            (plane.url, f"iris-default.localhost:{plane.settings.port}"),
            (plane.url, "iris-default.localhost"),
            (plane.url, "IRIS-default.localhost"),
            (plane.url, "iris-default.localhost."),
            (plane.url, f"iris-default.localhost.:{plane.settings.port}"),
            (f"http://127.0.0.1:{own}", "whatever.example"),
        ):
            async with client.post(url + "/predict?x=1", data=b"\x00\xff", headers={"Host": host}) as answer:
                got = await answer.json()
            assert answer.status == 200
            assert (got["path"], got["size"], got["headers"]["host"]) == (
                "/predict?x=1",
                2,
                host.replace("localhost.", "localhost"),
            )


async def test_images_are_asked_for_at_the_apis_hosts_and_deployments_keep_their_paths(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    async def images(request: web.Request) -> web.Response:
        return web.json_response({"images": request.path_qs, "authorization": request.headers.get("authorization")})

    gateway_settings.run_dir.mkdir(exist_ok=True)
    front, socket = gateway_settings.http_address, f"unix:{gateway_settings.run_dir}/images"
    async with serve(echo, front), serve(images, socket), serve(echo) as replica:
        peers = [messages.Peer("http", front, http2=False), messages.Peer("images", socket, http2=False)]
        async with open_plane(gateway_settings, *peers) as plane:
            await plane.deployer.publish(route("a", replica))
            for path in ("/v2", "/v2/", "/v2/default/a/manifests/sha256:1?n=1"):
                async with client.get(f"{plane.url}{path}", headers={"authorization": "Basic eDp5"}) as answer:
                    assert await answer.json() == {"images": path, "authorization": "Basic eDp5"}
            async with client.get(f"{plane.url}/v2x") as answer:
                assert (await answer.json())["path"] == "/v2x"
            # The Open Inference Protocol lives below /v2/ of a deployment.
            async with client.get(f"{plane.url}/v2/models/a", headers=plane.host("a")) as answer:
                assert (await answer.json())["path"] == "/v2/models/a"


async def test_platform_tokens_are_never_forwarded_and_other_credentials_are(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    async with serve(echo) as address:
        for policy in ({}, {"disabled": True}):
            await plane.deployer.publish(route("iris", address, capture=policy))
            for value, kept in (
                ("Bearer ekb_abc", False),
                ("bearer  ekb_abc", False),
                ("Bearer eks_abc", False),
                ("Bearer other", True),
                ("ekb_abc", False),
                ("Token eks_abc", False),
                ("Bearer other, Bearer ekb_abc", False),
                ("Basic Zm9vOmVrYl9hYmM=", True),
                ("Bearer leekb_abc", True),
            ):
                headers = {
                    **plane.host("iris"),
                    "authorization": value,
                    "cookie": "a=b",
                    "x-yatai-api-token": "ekb_abc",
                }
                async with client.post(plane.url + "/predict", headers=headers) as answer:
                    got = (await answer.json())["headers"]
                assert got.get("authorization") == (value if kept else None)
                assert "x-yatai-api-token" not in got
                assert got["cookie"] == "a=b"


async def test_a_deployment_that_is_not_ready_answers_503_with_a_problem_that_says_why(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    await plane.deployer.publish(route("iris", not_ready_detail='Building: pip says "no".\nTry again.'))
    async with client.post(plane.url + "/predict", data=b"{}", headers=plane.host("iris")) as answer:
        problem = json.loads(await answer.text())
    assert answer.status == 503
    assert answer.content_type == "application/problem+json"
    assert problem["reason"] == "DEPLOYMENT_NOT_READY"
    assert problem["detail"] == problem["error"] == 'Building: pip says "no".\nTry again.'
    assert answer.headers["retry-after"]


async def test_an_unknown_host_of_the_domain_answers_404_with_a_problem(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    async with client.get(plane.url + "/", headers=plane.host("nope")) as answer:
        problem = json.loads(await answer.text())
    assert (answer.status, problem["reason"]) == (404, "HOST_UNKNOWN")


async def test_where_no_replica_can_be_reached_the_answer_is_a_problem(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    await plane.deployer.publish(route("iris", f"127.0.0.1:{free_port()}"))
    async with client.post(plane.url + "/predict", data=b"{}", headers=plane.host("iris")) as answer:
        problem = json.loads(await answer.text())
    assert answer.status == 503
    assert answer.content_type == "application/problem+json"
    assert problem["reason"] == "REPLICA_UNREACHABLE"
    assert problem["type"].endswith("/errors#replica-unreachable")
    assert "deployments/iris" in problem["detail"]
    assert problem["status"] == 503


async def test_a_replica_that_is_gone_fails_no_request_while_another_is_there(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    async with serve(echo) as address:
        await plane.deployer.publish(route("iris", f"127.0.0.1:{free_port()}", address))
        for _ in range(50):
            async with client.post(plane.url + "/predict", data=b"{}", headers=plane.host("iris")) as answer:
                assert answer.status == 200


async def test_an_own_port_that_is_taken_breaks_nothing_else(plane: Plane, client: aiohttp.ClientSession) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with serve(echo) as address:
            own = free_port()
            routes = route("a", address, port=taken.getsockname()[1]), route("b", address, port=own)
            await plane.deployer.publish(*routes)
            assert plane.deployer.refused_ports == [taken.getsockname()[1]]
            for url, host in ((plane.url, plane.host("a")), (f"http://127.0.0.1:{own}", {})):
                async with client.get(url + "/", headers=host) as answer:
                    assert answer.status == 200
