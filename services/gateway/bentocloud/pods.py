"""Websockets: the builds of a bento and the replicas of a deployment as pods, and their logs.

A frame is JSON text with `type`, `message` and `payload`, all three present. A pod's name is opaque to clients:
`build-{build}`, or `{deployment}.{replica}`, which says where its log is read.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web

from ekiben import names
from ekiben.builder.v1 import builder_pb2 as builder
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.errors import EkibenError, InvalidArgument, NotFound
from ekiben.identity.v1 import identity_pb2 as identity
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.manifests import bento_manifest
from services.gateway.bentocloud.repositories import BENTOS
from services.gateway.bentocloud.wire import KUBE_NAMESPACE, Reply, last

_BUILDER = "yatai.ai/is-bento-image-builder"
_COMPONENT = "yatai.ai/bento-function-component-type"
_REPOSITORY = "yatai.ai/bento-repository"
_VERSION = "yatai.ai/bento"
_DEPLOYMENT = "yatai.ai/bento-deployment"
_PING_S = 20.0
# How long a connection may stay open without the one frame that a client owes.
_PATIENCE_S = 30.0
# Lines that wait are sent together; more at once would make frames that the client reads slowly.
_LINES_A_FRAME = 200

_REPLICA_STATES = {
    deployer.Replica.STARTING: ("Pending", "ContainerCreating"),
    deployer.Replica.READY: ("Running", "Running"),
    deployer.Replica.UNREADY: ("Running", "Unhealthy"),
    deployer.Replica.DRAINING: ("Running", "Terminating"),
    deployer.Replica.CRASHED: ("Failed", "CrashLoopBackOff"),
}


async def builder_pods(call: Call) -> web.StreamResponse:
    """GET /ws/v1/clusters/{cluster}/pods: the running build of the bento that the selector names, if there is one."""

    async def found() -> list[Reply]:
        wanted = dict(term.split("=", 1) for term in call.query("selector").split(",") if "=" in term)
        bento = str(names.Bento(wanted.get(_REPOSITORY, ""), wanted.get(_VERSION, "")))
        request = builder.ListBuildsRequest(bento=bento, page_size=1)
        builds = (await call(call.api.builds.ListBuilds, request)).builds
        return [build_pod(build) for build in builds if build.state in (builder.Build.QUEUED, builder.Build.RUNNING)]

    return await _one_frame(call, found)


async def deployment_pods(call: Call) -> web.StreamResponse:
    """GET /ws/v2/deployments/{name}/pods: its replicas."""

    async def found() -> list[Reply]:
        name = str(names.Deployment(call.path("deployment")))
        deployment = await call(call.api.deployments.GetDeployment, deployer.GetDeploymentRequest(name=name))
        replicas = await call(call.api.deployments.ListReplicas, deployer.ListReplicasRequest(parent=name))
        entry = ""
        with suppress(NotFound):
            bento = await BENTOS.get(call, deployment.template.bento)
            _, repository, _, version = bento.name.split("/")
            entry = bento_manifest(bento.manifest, repository, version)["entry_service"]
        return [replica_pod(deployment, replica, entry) for replica in replicas.replicas]

    return await _one_frame(call, found)


async def tail(call: Call) -> web.StreamResponse:
    """GET /ws/v1/clusters/{cluster}/tail: the log of one pod, from the frame that asks for it to its end."""
    await _authenticate(call)
    socket = web.WebSocketResponse(heartbeat=_PING_S)
    await socket.prepare(call.request)
    sender: asyncio.Task[None] | None = None
    try:
        async for incoming in socket:
            if incoming.type is not WSMsgType.TEXT:
                continue
            frame = _read_frame(incoming.data)
            if frame.get("type") == "heartbeat":
                await _send(socket, "heartbeat")
            elif frame.get("type") == "data" and sender is None:
                payload = frame.get("payload")
                sender = asyncio.create_task(_send_log(call, socket, payload if isinstance(payload, dict) else {}))
    except ConnectionError:
        pass
    finally:
        if sender is not None:
            sender.cancel()
            await asyncio.wait([sender])
    return socket


def build_pod(build: builder.Build) -> Reply:
    """A build as the pod that builds an image. A queued one counts as running, so that its log is followed at once."""
    _, repository, _, version = build.bento.split("/")
    labels = {_BUILDER: "true", _REPOSITORY: repository, _VERSION: version}
    return _pod(f"build-{last(build.name)}", labels, "", "Running", "Running", ready=True)


def replica_pod(deployment: deployer.Deployment, replica: deployer.Replica, entry_service: str) -> Reply:
    """A replica as a pod."""
    component = "api-server" if replica.service == entry_service or not entry_service else "runner"
    phase, status = _REPLICA_STATES.get(replica.state, ("Unknown", "Unknown"))
    name = last(deployment.name)
    labels = {_COMPONENT: component, _DEPLOYMENT: name}
    ready = replica.state == deployer.Replica.READY
    return _pod(
        f"{name}.{replica.replica}", labels, replica.service, phase, status, ready=ready, reason=replica.message
    )


def _pod(
    name: str, labels: dict[str, str], runner: str, phase: str, status: str, *, ready: bool, reason: str = ""
) -> Reply:
    return {
        "name": name,
        "namespace": KUBE_NAMESPACE,
        "labels": labels,
        "pod_status": {"status": status, "reason": reason},
        "status": {"phase": phase, "ready": ready},
        "runner_name": runner,
    }


async def _one_frame(call: Call, found: Callable[[], Awaitable[list[Reply]]]) -> web.StreamResponse:
    """Answer with one frame and wait for the client to close."""
    await _authenticate(call)
    socket = web.WebSocketResponse(heartbeat=_PING_S)
    await socket.prepare(call.request)
    with suppress(ConnectionError, TimeoutError):
        try:
            await _send(socket, "success", "", await found())
        except EkibenError as error:
            await _send(socket, "error", str(error), [])
        async with asyncio.timeout(_PATIENCE_S):
            async for _ in socket:
                pass
    await socket.close()
    return socket


async def _authenticate(call: Call) -> None:
    """Refuse with an HTTP status, before the connection is a websocket."""
    await call(call.api.accounts.GetCaller, identity.GetCallerRequest())


async def _send_log(call: Call, socket: web.WebSocketResponse, payload: dict[str, Any]) -> None:
    try:
        lines = payload.get("tail_lines")
        stream = _open_log(
            call, call.query("pod_name"), bool(payload.get("follow")), lines if isinstance(lines, int) else None
        )
        async for batch in _batches(stream):
            # Each item is whole lines, so it never ends within a character.
            items = [base64.b64encode(f"{line.text}\n".encode()).decode() for line in batch]
            await _send(socket, "data", None, {"items": items, "type": "append"})
        await _send(socket, "success", "EOF")
    except ConnectionError:
        return
    except EkibenError as error:
        with suppress(ConnectionError):
            await _send(socket, "error", str(error))
    await socket.close()


def _open_log(call: Call, pod: str, follow: bool, tail_lines: int | None) -> Any:
    if pod.startswith("build-") and "." not in pod:
        build = str(names.Build(pod.removeprefix("build-")))
        return call.stream(
            call.api.builds.ReadBuildLog,
            builder.ReadBuildLogRequest(name=build, follow=follow, tail_lines=max(tail_lines or 0, 0)),
        )
    deployment, dot, replica = pod.partition(".")
    if not dot:
        raise InvalidArgument(f"There is no pod {pod[:100]!r}.", reason="POD_UNKNOWN")
    return call.stream(
        call.api.deployments.ReadLogs,
        deployer.ReadLogsRequest(
            name=str(names.Deployment(deployment)), replica=replica, follow=follow, tail_lines=tail_lines
        ),
    )


async def _batches(stream: Any) -> AsyncIterator[list[Any]]:
    """Lines as they come, those that wait together. Cancels the call when the reader leaves."""
    waiting: asyncio.Queue[Any] = asyncio.Queue(_LINES_A_FRAME)

    async def read() -> None:
        try:
            async for line in stream:
                await waiting.put(line)
            await waiting.put(None)
        except Exception as error:
            await waiting.put(error)

    reader = asyncio.create_task(read())
    try:
        while True:
            batch = [await waiting.get()]
            while not waiting.empty() and len(batch) < _LINES_A_FRAME:
                batch.append(waiting.get_nowait())
            end = batch[-1] if batch[-1] is None or isinstance(batch[-1], Exception) else ...
            if lines := batch if end is ... else batch[:-1]:
                yield lines
            if isinstance(end, Exception):
                raise end
            if end is None:
                return
    finally:
        stream.cancel()
        reader.cancel()
        await asyncio.wait([reader])


async def _send(socket: web.WebSocketResponse, kind: str, message: str | None = None, payload: Any = None) -> None:
    await socket.send_str(json.dumps({"type": kind, "message": message, "payload": payload}))


def _read_frame(text: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        frame = json.loads(text)
        if isinstance(frame, dict):
            return frame
    return {}
