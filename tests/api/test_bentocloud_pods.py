"""Websockets of the wire protocol: raw frames, and the real client's own reader."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from ekiben.builder.v1 import builder_pb2 as builder
from ekiben.deployer.v1 import deployer_pb2 as deployer
from tests.bentoml_clients import client, environment
from tests.fixtures_http import Front, front

__all__ = ["front"]

SELECTOR = "selector=yatai.ai/bento-repository=iris,yatai.ai/bento=v1"
ASK = {"type": "data", "payload": {"id": "1", "container_name": "main", "follow": True, "tail_lines": 50}}


@pytest.fixture
async def session(front: Front) -> AsyncIterator[aiohttp.ClientSession]:
    """A client which sends its token as BentoML does."""
    async with aiohttp.ClientSession(front.url, headers={"X-YATAI-API-TOKEN": front.token}) as opened:
        yield opened


def put_build(front: Front, state: Any = builder.Build.RUNNING) -> None:
    front.builds.kept.append(builder.Build(name="builds/b1", bento="bentoRepositories/iris/bentos/v1", state=state))


def put_deployment(front: Front) -> None:
    front.deployments.kept["deployments/web"] = deployer.Deployment(
        name="deployments/web", template={"bento": "bentoRepositories/iris/bentos/v1"}
    )
    replica = deployer.Replica(replica="r1", service="Svc", state=deployer.Replica.READY)
    front.deployments.replicas.append(replica)


def texts(frame: dict[str, Any]) -> list[str]:
    """The lines of a frame; each item must be UTF-8 by itself."""
    return [base64.b64decode(item).decode() for item in frame["payload"]["items"]]


@pytest.mark.parametrize(("state", "shown"), [("QUEUED", 1), ("RUNNING", 1), ("SUCCEEDED", 0), ("FAILED", 0)])
async def test_a_running_build_is_a_pod(front: Front, session: aiohttp.ClientSession, state: str, shown: int) -> None:
    put_build(front, builder.Build.State.Value(state))
    async with session.ws_connect(f"/ws/v1/clusters/default/pods?namespace=default&{SELECTOR}") as socket:
        frame = await socket.receive_json(timeout=10)
    assert (frame["type"], frame["message"], len(frame["payload"])) == ("success", "", shown)


async def test_replicas_are_pods(front: Front, session: aiohttp.ClientSession) -> None:
    put_deployment(front)
    async with session.ws_connect("/ws/v2/deployments/web/pods?organization_name=default&cluster=default") as socket:
        frame = await socket.receive_json(timeout=10)
    (pod,) = frame["payload"]
    assert (pod["name"], pod["status"]["phase"]) == ("web.r1", "Running")
    assert pod["labels"]["yatai.ai/bento-function-component-type"] == "api-server"


async def test_errors_are_frames(front: Front, session: aiohttp.ClientSession) -> None:
    async with session.ws_connect("/ws/v2/deployments/none/pods") as socket:
        frame = await socket.receive_json(timeout=10)
    assert frame["type"] == "error"
    assert "none" in frame["message"]
    for pod in ("none.r1", "build-none", "", "x", "build-"):
        async with session.ws_connect(f"/ws/v1/clusters/default/tail?pod_name={pod}") as socket:
            await socket.send_json(ASK)
            frame = await socket.receive_json(timeout=10)
            assert (frame["type"], frame["payload"]) == ("error", None)


async def test_without_a_token_the_handshake_is_refused(front: Front) -> None:
    async with aiohttp.ClientSession(front.url) as stranger:
        for path in ("/ws/v2/deployments/web/pods", "/ws/v1/clusters/default/tail?pod_name=web.r1"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await stranger.ws_connect(path)
            assert caught.value.status == 401


async def test_a_log_is_followed_with_heartbeats_to_its_end(front: Front, session: aiohttp.ClientSession) -> None:
    put_deployment(front)
    async with session.ws_connect("/ws/v1/clusters/default/tail?pod_name=web.r1&timestamps=false") as socket:
        await socket.send_str("not json")
        await socket.send_json({"type": "heartbeat"})
        assert await socket.receive_json(timeout=10) == {"type": "heartbeat", "message": None, "payload": None}
        await socket.send_json(ASK)
        for text in ("hello", "grüße 🍱 " * 1000):
            front.deployments.log.put_nowait(text)
            frame = await socket.receive_json(timeout=10)
            assert (frame["type"], frame["message"], frame["payload"]["type"]) == ("data", None, "append")
            assert texts(frame) == [text + "\n"]
        front.deployments.log.put_nowait(None)
        assert await socket.receive_json(timeout=10) == {"type": "success", "message": "EOF", "payload": None}


async def test_a_client_that_leaves_ends_the_call(front: Front, session: aiohttp.ClientSession) -> None:
    put_deployment(front)
    async with session.ws_connect("/ws/v1/clusters/default/tail?pod_name=web.r1") as socket:
        await socket.send_json(ASK)
        front.deployments.log.put_nowait("one")
        await socket.receive_json(timeout=10)
    async with asyncio.timeout(10):
        await front.deployments.log_ended.wait()


async def test_the_real_client_reads_pods_and_logs(front: Front, tmp_path: Any) -> None:
    put_build(front)
    front.builds.lines = [f"line {n} ä" for n in range(1000)]
    script = f"""
import base64, json, threading
from bentoml._internal.cloud.client import RestApiClient
from bentoml._internal.cloud.schemas.schemasv2 import KubePodWSResponseSchema
from bentoml._internal.cloud.schemas.utils import schema_from_object
from httpx_ws import connect_ws
client = RestApiClient({front.url!r}, {front.token!r})
url = {front.url!r}.replace("http", "ws") + "/ws/v1/clusters/default/pods?namespace=default&{SELECTOR}"
with connect_ws(url, client=client.session) as ws:
    (pod,) = schema_from_object(ws.receive_json(), KubePodWSResponseSchema).payload
assert pod.labels["yatai.ai/is-bento-image-builder"] == "true" and pod.pod_status.status == "Running"
tail = client.v2.tail_logs(cluster_name="default", namespace="default", pod_name=pod.name,
                           container_name="builder", stop_event=threading.Event())
print(json.dumps("".join(base64.b64decode(piece).decode("utf-8") for piece in tail)))
"""
    process = await asyncio.create_subprocess_exec(
        client("1.4") / "python", "-c", script, env=environment(tmp_path), stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    assert json.loads(out.decode().strip().splitlines()[-1]) == "".join(f"{line}\n" for line in front.builds.lines)
