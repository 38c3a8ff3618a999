"""From a deployment to its first answer beside `kubectl apply` of the same pods, and what the gateway adds to a Service.

The image is present on the node on both sides. The peer's manifests are those that the platform made, as the cluster has
them: the same pod by hand. `bentoml deploy` is a Python program which takes seconds to begin; the call that it makes is
measured by itself too.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Table, timed
from tests.bentoml_clients import client
from tests.cluster import Cluster, running_cluster
from tests.cluster_platform import new_namespace, platform_on
from tests.platform import BentoMl, Platform, http, wait_for

BENTO = Path(__file__).resolve().parent.parent.parent / "tests" / "bentos" / "versions"
JSON = {"content-type": "application/json"}
CONNECTIONS, LOADED_S = 8, 5
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_KINDS = "serviceaccounts,secrets,services,deployments"


def until_answer(url: str, host: str = "") -> None:
    """Poll, each 50 ms, until the service answers a prediction."""
    headers = JSON | ({"host": host} if host else {})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if http("POST", f"{url}/version", b"{}", headers, timeout_s=2).status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{host or url} does not answer")


def by_hand(objects: list[dict[str, Any]], name: str) -> tuple[str, str]:
    """The same objects under another name and without labels of ours; gives their JSON and the Service's name."""
    made = []
    old = next(each["metadata"]["name"] for each in objects if each["kind"] == "Deployment")
    for each in objects:
        text = json.dumps({key: value for key, value in each.items() if key != "status"}).replace(old, name)
        one = json.loads(text)
        one["metadata"] = {"name": one["metadata"]["name"], "labels": {"app": name}}
        if one["kind"] == "Service":
            ports = [{key: port[key] for key in ("name", "port", "targetPort")} for port in one["spec"]["ports"]]
            one["spec"] = {"selector": {"app": name}, "ports": ports}
        if one["kind"] == "Deployment":
            one["spec"]["selector"] = {"matchLabels": {"app": name}}
            one["spec"]["template"]["metadata"] = {"labels": {"app": name}}
        made.append(one)
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": made}), name


def apply(cluster: Cluster, namespace: str, manifests: str, name: str) -> None:
    """Until the Service answers. Its address is known once it is there."""
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=manifests)
    address = cluster.get("service", name, "-n", namespace)["spec"]["clusterIP"]
    until_answer(f"http://{address}:3000")


def load(url: str, host: str, connections: int) -> tuple[float, float]:
    """Requests per second and median in ms of `connections` callers in a closed loop."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        headers = {"content-type": "application/json", **({"Host": host} if host else {})}
        lines = ['wrk.method = "POST"', 'wrk.body = "{}"', *(f'wrk.headers["{k}"] = "{v}"' for k, v in headers.items())]
        script.write("\n".join(lines))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{LOADED_S}s", "--latency", "-s", script.name, f"{url}/version"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in output, output
    number, unit = re.findall(r"^ *50% +([\d.]+)(us|ms|s)\s*$", output, re.MULTILINE)[0]
    return float(re.findall(r"Requests/sec: +([\d.]+)", output)[0]), float(number) * _UNITS[unit]


def run(rounds: int) -> None:
    """Both tables, on one cluster."""
    os.environ.setdefault("EKIBEN_TEST_KUBERNETES", "1")
    with (
        running_cluster() as cluster,
        new_namespace(cluster, "bench") as namespace,
        tempfile.TemporaryDirectory() as folder,
        platform_on(cluster, namespace, Path(folder)) as platform,
    ):
        bentoml = BentoMl(client("1.4"), Path(folder) / "client").login(platform)
        bentoml("build", str(BENTO), timeout_s=300)
        bentoml("push", "versions:latest")
        deploying(cluster, namespace, platform, bentoml, rounds)
        answering(cluster, namespace, platform, rounds)


def deploying(cluster: Cluster, namespace: str, platform: Platform, bentoml: BentoMl, rounds: int) -> None:
    """The first table. A deployment `stays` runs at the end."""

    def called(name: str) -> None:
        body = {"name": f"deployments/{name}", "template": {"bento": "bentoRepositories/versions/bentos/latest"}}
        answer = platform.api("POST", "/v1/deployments", body)
        assert answer.status == 200, answer.body
        until_answer(platform.url, f"{name}-default.localhost")

    def deployed(name: str) -> None:
        command = [bentoml.bin / "bentoml", "deploy", "versions:latest", "--name", name, "--no-wait"]
        process = subprocess.Popen(command, env=bentoml.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until_answer(platform.url, f"{name}-default.localhost")
        process.wait()

    def gone(name: str) -> None:
        platform.ekiben("deployments", "delete", name, "--yes")
        wait_for("no pods", lambda: not pods(name), 120)

    def pods(name: str) -> list[Any]:
        found: list[Any] = cluster.get("pods", "-n", namespace, "-l", f"app.kubernetes.io/name={name}")["items"]
        return found

    called("stays")
    # Kubernetes spreads two pods of a Service over two nodes: so that both have the image.
    platform.ekiben("deployments", "scale", "stays", "2")
    wait_for("both nodes", lambda: len({pod["spec"].get("nodeName") for pod in pods("stays")}) == 2, 120)
    platform.ekiben("deployments", "scale", "stays", "1")
    wait_for("one pod", lambda: len(pods("stays")) == 1, 120)
    live = cluster.get(_KINDS, "-n", namespace, "-l", "app.kubernetes.io/name=stays")["items"]
    figures: dict[str, list[float]] = {"called": [], "deployed": [], "hand": []}
    ways: dict[str, Callable[[str], None]] = {"called": called, "deployed": deployed}
    for number in range(rounds):
        for way, action in ways.items():
            name = f"{way}-{number}"
            figures[way].append(timed(lambda action=action, name=name: action(name)))  # type: ignore[misc]
            gone(name)
        manifests, name = by_hand(live, f"hand-{number}")
        figures["hand"].append(timed(lambda m=manifests, n=name: apply(cluster, namespace, m, n)))  # type: ignore[misc]
        cluster.kubectl("delete", _KINDS, "-n", namespace, "-l", f"app={name}")
    table = Table("From a deployment to the first answer, on Kubernetes, image present")
    peer = "kubectl apply of the same pod"
    table.add("CreateDeployment (target: at most 1.15)", figures["called"], figures["hand"], "s", peer)
    table.add("`bentoml deploy`, its own start included", figures["deployed"], figures["hand"], "s", peer)
    table.print()


def answering(cluster: Cluster, namespace: str, platform: Platform, rounds: int) -> None:
    """The second table."""
    if shutil.which("wrk") is None:
        print("\nThe gateway's share is not measured: that takes wrk (`apt-get install wrk`).")
        return
    service = cluster.get("services", "-n", namespace, "-l", "app.kubernetes.io/name=stays")["items"][0]
    ways = {
        "gateway": (platform.url, "stays-default.localhost"),
        "service": (f"http://{service['spec']['clusterIP']}:3000", ""),
    }
    table = Table("A prediction through the gateway, captured and traced, and by the Service directly")
    for connections in (1, CONNECTIONS):
        rps: dict[str, list[float]] = {way: [] for way in ways}
        p50: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (url, host) in ways.items():
                one, median = load(url, host, connections)
                rps[way].append(one)
                p50[way].append(median)
        callers = f"{connections} callers" if connections > 1 else "one caller"
        table.add(f"median, {callers}", p50["gateway"], p50["service"], "ms", "the Service")
        table.add(f"rate, {callers}", rps["gateway"], rps["service"], "1/s", "the Service")
    table.print()
