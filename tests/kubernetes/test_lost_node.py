"""A node that dies with all that runs on it: what callers see, what is said, and that its pods come back elsewhere."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import ANOTHER, Cluster
from tests.installing import Load
from tests.platform import Answer, BentoMl, Platform, http, wait_for

JSON = {"content-type": "application/json"}
LOST = ("not-ready", "unreachable")


def spec_of(name: str) -> dict[str, Any]:
    """One that would rather be on that node, and leaves it 15 s after the cluster lost it."""
    fields = [{"key": "kubernetes.io/hostname", "operator": "In", "values": [ANOTHER]}]
    preferred = [{"weight": 100, "preference": {"matchExpressions": fields}}]
    leaves = {"operator": "Exists", "effect": "NoExecute", "toleration_seconds": 15}
    pod = {
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
        "tolerations": [
            {"key": ANOTHER, "operator": "Exists"},
            *({"key": f"node.kubernetes.io/{how}", **leaves} for how in LOST),
        ],
        "envs": [{"name": "NODE", "field": "spec.nodeName"}],
    }
    return {"bento": "placed:lost", "name": name, "template": {"services": {"Placed": {"pod": pod}}}}


def test_pods_of_a_node_that_dies_come_back_elsewhere_and_predictions_go_on(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path: Path,
) -> None:
    platform, name = kubernetes_platform, f"placed-{os.urandom(2).hex()}"
    project = shutil.copytree(bentos / "placed", tmp_path / "placed")
    kubernetes_bentoml("build", ".", "--version", "lost", cwd=project)
    kubernetes_bentoml("push", "placed:lost")
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(spec_of(name)))
    platform.ekiben("deployments", "create", "-f", str(tmp_path / "deployment.yaml"), timeout_s=500)
    url = str(described(platform, name)["urls"][0])

    def pods() -> dict[str, dict[str, Any]]:
        """By name."""
        found = cluster.get("pods", "-n", kubernetes_namespace, "-l", f"app.kubernetes.io/name={name}")["items"]
        return {each["metadata"]["name"]: each for each in found}

    def on(node: str) -> list[dict[str, Any]]:
        return [each for each in pods().values() if each["spec"]["nodeName"] == node]

    with cluster.another_node() as node:
        # The first replica is on another node, since this one was not there yet.
        platform.ekiben("deployments", "scale", name, "2", timeout_s=300)
        ((first,), (lost,)) = [each for each in pods().values() if each not in on(ANOTHER)], on(ANOTHER)
        thinking = Thinking(f"{url}/think", 8)
        wait_for("requests in the pod", lambda: in_progress(lost) and in_progress(first))
        with Load(f"{url}/node", JSON) as load:
            wait_for("answers of both", lambda: load.answered > 20)
            node.kill()
            away = f"Its node {ANOTHER} does not answer the cluster."
            wait_for("what happened, in words", lambda: away in conditions(platform, name), 120)
            broken = load.failed[:]
            wait_for("another pod", lambda: len(ready(platform, name)) == 2, 120)
            told = next(each for each in replicas(platform, name) if each["replica"] == lost["metadata"]["name"])
            assert told["state"] == "DRAINING" and "has a taint that it does not tolerate" in told["message"], told
            wait_for("all is well", lambda: "Ready: Placed 2/2." in conditions(platform, name), 60)
            answered = load.answered
            wait_for("answers of both", lambda: load.answered > answered + 50)
        said = thinking.answers()
    living = {each["spec"]["nodeName"] for each in pods().values() if not each["metadata"].get("deletionTimestamp")}
    assert ANOTHER not in living and first["spec"]["nodeName"] in living
    # Only what the pod had when it died, and none once it was noticed. Of each of the three callers at most one request
    # when the server died, and one in the listening socket that its supervisor holds open for a moment longer.
    assert len(load.failed) <= 6 and broken == load.failed and all("CONNECTION_LOST" in each for each in load.failed)
    assert {each.body.decode() for each in said if each.status == 200} == {first["spec"]["nodeName"]}
    cut = [each.json() for each in said if each.status != 200]
    assert cut and {(each["status"], each["reason"]) for each in cut} == {(503, "CONNECTION_LOST")}
    platform.ekiben("deployments", "delete", name, "--yes", "--no-wait")
    # What the cluster would do by itself some minutes after the Node went.
    forced = ("delete", "pod", "-n", kubernetes_namespace, lost["metadata"]["name"], "--force", "--ignore-not-found")
    cluster.kubectl(*forced)


class Thinking:
    """Callers that wait for an answer."""

    def __init__(self, url: str, callers: int) -> None:
        self._answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._call, args=(url,)) for _ in range(callers)]
        for each in self._threads:
            each.start()

    def _call(self, url: str) -> None:
        self._answers.append(http("POST", url, b'{"seconds": 20}', JSON, timeout_s=120))

    def answers(self) -> list[Answer]:
        """All of them, once they are there."""
        for each in self._threads:
            each.join()
        return self._answers


def in_progress(pod: dict[str, Any]) -> bool:
    """Whether it is thinking."""
    lines = http("GET", f"http://{pod['status']['podIP']}:3000/metrics").body.decode().splitlines()
    counts = [line for line in lines if line.startswith("bentoml_service_request_in_progress") and "/think" in line]
    return any(not line.endswith(" 0.0") for line in counts)


def replicas(platform: Platform, name: str) -> list[Any]:
    found: list[Any] = platform.ekiben_json("deployments", "replicas", name)
    return found


def ready(platform: Platform, name: str) -> list[Any]:
    return [each for each in replicas(platform, name) if each["state"] == "READY"]


def conditions(platform: Platform, name: str) -> str:
    return " ".join(each.get("message", "") for each in described(platform, name)["conditions"])


def described(platform: Platform, name: str) -> Any:
    return platform.ekiben_json("deployments", "get", name)
