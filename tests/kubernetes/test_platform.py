"""The main job on Kubernetes: what `bentoml deploy` gives, through the gateway, with images pulled from the platform."""

import json
import shutil
import threading
from pathlib import Path

from tests.cluster import Cluster
from tests.platform import BentoMl, Platform, http, wait_for

JSON = {"content-type": "application/json"}


def deploy(bentoml: BentoMl, project: Path, name: str) -> None:
    bentoml("deploy", ".", "-n", name, cwd=project, timeout_s=500)


def test_a_deployment_is_pods_that_answer_and_are_captured(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path: Path,
) -> None:
    deploy(kubernetes_bentoml, shutil.copytree(bentos / "chain", tmp_path / "chain"), "chain")
    found = json.loads(kubernetes_platform.ekiben("deployments", "get", "chain", "-o", "json").stdout)
    url = found["urls"][0]
    answer = http("POST", f"{url}/describe", b'{"text": "two words"}', JSON)
    assert (answer.status, answer.json()) == (200, {"words": 2, "letters": 9}), answer.body
    pods = cluster.get("pods", "-n", kubernetes_namespace, "-l", "app.kubernetes.io/name=chain")["items"]
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods} == {"Chain", "Words"}
    assert {pod["spec"]["serviceAccountName"] for pod in pods}.isdisjoint({"default"})
    names = {pod["metadata"]["name"] for pod in pods}

    def captured() -> bool:
        listed = json.loads(kubernetes_platform.ekiben("predictions", "list", "-d", "chain", "-o", "json").stdout)
        return any(each["replica"] in names for each in listed if each["path"] == "/describe")

    wait_for("the capture", captured, 60)
    assert "Words" in kubernetes_platform.ekiben("deployments", "logs", "chain", "--service", "Words").stdout
    kubernetes_platform.ekiben("deployments", "delete", "chain", "--yes")


def test_an_update_under_load_fails_no_request_and_a_restart_of_the_platform_ends_no_pod(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path: Path,
) -> None:
    project = shutil.copytree(bentos / "versions", tmp_path / "versions")
    deploy(kubernetes_bentoml, project, "versions")
    url = json.loads(kubernetes_platform.ekiben("deployments", "get", "versions", "-o", "json").stdout)["urls"][0]
    failed: list[tuple[int, bytes]] = []
    seen: set[str] = set()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = http("POST", f"{url}/version", b"{}", JSON)
            seen.add(answer.body.decode())
            if answer.status != 200:
                failed.append((answer.status, answer.body))

    callers = [threading.Thread(target=load) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        service = project / "service.py"
        service.write_text(service.read_text().replace('VERSION = "1"', 'VERSION = "2"'))
        kubernetes_bentoml("deployment", "update", "versions", "--bento", ".", cwd=project, timeout_s=500)
        wait_for("the new version alone", lambda: http("POST", f"{url}/version", b"{}", JSON).body == b"2", 300)
        selector = ("-n", kubernetes_namespace, "-l", "app.kubernetes.io/name=versions")
        wait_for("the old pods gone", lambda: len(cluster.get("pods", *selector)["items"]) == 1, 120)
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failed and seen == {"1", "2"}
    before = [pod["metadata"]["uid"] for pod in cluster.get("pods", *selector)["items"]]
    kubernetes_platform.stop()
    assert [pod["metadata"]["uid"] for pod in cluster.get("pods", *selector)["items"]] == before
    kubernetes_platform.start()
    wait_for("the answer after the restart", lambda: http("POST", f"{url}/version", b"{}", JSON).body == b"2", 60)
    assert [pod["metadata"]["uid"] for pod in cluster.get("pods", *selector)["items"]] == before
    kubernetes_platform.ekiben("deployments", "delete", "versions", "--yes")
    wait_for("nothing left", lambda: not cluster.get("pods,services,deployments", *selector)["items"], 120)
