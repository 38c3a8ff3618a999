"""A node in name only: every pod gets it, and is said to run and to be ready at once. No container ever starts.

For control planes without nodes: `python -m tests.simulated_node KUBECONFIG` until it is killed. What needs more of a
node than that (logs, a terminal, an answer to a request) is not there.
"""

import asyncio
import json
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

NODE = "simulated"
AT_ONCE = 16


class Node:
    """See the module."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self._pods: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._bound = 0

    async def run(self) -> None:
        """For ever."""
        node = {"metadata": {"name": NODE}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
        await self._call("POST", "/api/v1/nodes", node)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(self._work())
            tasks.create_task(self._watch())

    async def _watch(self) -> None:
        version = ""
        while True:
            if not version:
                listed = await self._call("GET", "/api/v1/pods")
                version = listed["metadata"]["resourceVersion"]
                for pod in listed["items"]:
                    self._pods.put_nowait(pod)
            url = f"{self._url}/api/v1/pods?watch=true&allowWatchBookmarks=true&resourceVersion={version}"
            async with self._session.get(url) as answer:
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        version = ""
                        break
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] in ("ADDED", "MODIFIED"):
                        self._pods.put_nowait(event["object"])

    async def _work(self) -> None:
        while True:
            pod = await self._pods.get()
            path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
            if pod["metadata"].get("deletionTimestamp"):
                await self._call("DELETE", path, {"gracePeriodSeconds": 0})
            elif not pod["spec"].get("nodeName"):
                target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
                bound = {"metadata": {"name": pod["metadata"]["name"]}, "target": target}
                await self._call("POST", f"{path}/binding", bound)
                self._bound += 1
                status = _ready(pod, f"10.{self._bound >> 16 & 255}.{self._bound >> 8 & 255}.{self._bound & 255}")
                await self._call("PATCH", f"{path}/status", {"status": status})

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, self._url + path, data=data, headers={"Content-Type": kind}) as answer:
            # A pod that is another or gone by now is told of again.
            return await answer.json() if answer.status < 300 else None


def _ready(pod: dict[str, Any], address: str) -> dict[str, Any]:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": now}
        for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    containers = [
        {
            "name": one["name"],
            "image": one["image"],
            "imageID": "",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": now}},
        }
        for one in pod["spec"]["containers"]
    ]
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now,
        "conditions": conditions,
        "containerStatuses": containers,
    }


async def main(kubeconfig: Path) -> None:
    """Be that node."""
    read = yaml.safe_load(kubeconfig.read_text())
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    headers = {"Authorization": f"Bearer {read['users'][0]['user']['token']}"}
    connector = aiohttp.TCPConnector(ssl=trust, limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=1 << 22
    ) as session:
        await Node(session, read["clusters"][0]["cluster"]["server"]).run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
