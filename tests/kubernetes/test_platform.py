"""The main job on Kubernetes: what `bentoml deploy` gives, through the gateway, with images pulled from the platform."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.cluster import Cluster, Passage
from tests.platform import BentoMl, Platform, http, wait_for

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> str:
    """A namespace of this module's own."""
    name = f"platform-{os.urandom(4).hex()}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    return name


@pytest.fixture(scope="module")
def platform(cluster: Cluster, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """`ekiben up` whose replicas are pods, and whose images nodes pull from it."""
    with cluster.passage() as passage:
        yield from _platform(cluster, namespace, passage, tmp_path_factory.mktemp("platform"))


def _platform(cluster: Cluster, namespace: str, passage: Passage, folder: Path) -> Iterator[Platform]:
    env = {
        "EKIBEN_BUILDER_BASES": base_image(),
        "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system",
        "EKIBEN_DEPLOYER_RUNTIME": "kubernetes",
        "EKIBEN_DEPLOYER_KUBECONFIG": str(cluster.kubeconfig),
        "EKIBEN_DEPLOYER_KUBERNETES_NAMESPACE": namespace,
        "EKIBEN_DEPLOYER_KUBERNETES_PULL_HOST": passage.name,
        "EKIBEN_DEPLOYER_KUBERNETES_PULL_SECRET": "images",
        "EKIBEN_DEPLOYER_DRAIN_S": "5",
    }
    up = Platform(folder / "data", env=env)
    try:
        up.start()
        made = json.loads(up.ekiben("tokens", "create", "nodes", "--role", "viewer", "-o", "json").stdout)
        login = [f"--docker-server={passage.name}", "--docker-username=nodes", f"--docker-password={made['token']}"]
        cluster.kubectl("create", "secret", "docker-registry", "images", "-n", namespace, *login)
        with passage.to(f"127.0.0.1:{up.port}"):
            yield up
    finally:
        up.close()


@pytest.fixture(scope="module")
def bentoml(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> BentoMl:
    """The `bentoml` command 1.4, logged in."""
    return BentoMl(client("1.4"), tmp_path_factory.mktemp("client")).login(platform)


def deploy(bentoml: BentoMl, project: Path, name: str) -> None:
    bentoml("deploy", ".", "-n", name, cwd=project, timeout_s=500)


def test_a_deployment_is_pods_that_answer_and_are_captured(
    cluster: Cluster, namespace: str, platform: Platform, bentoml: BentoMl, bentos: Path, tmp_path: Path
) -> None:
    deploy(bentoml, shutil.copytree(bentos / "chain", tmp_path / "chain"), "chain")
    found = json.loads(platform.ekiben("deployments", "get", "chain", "-o", "json").stdout)
    url = found["urls"][0]
    answer = http("POST", f"{url}/describe", b'{"text": "two words"}', JSON)
    assert (answer.status, answer.json()) == (200, {"words": 2, "letters": 9}), answer.body
    pods = cluster.get("pods", "-n", namespace, "-l", "app.kubernetes.io/name=chain")["items"]
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods} == {"Chain", "Words"}
    assert {pod["spec"]["serviceAccountName"] for pod in pods}.isdisjoint({"default"})
    names = {pod["metadata"]["name"] for pod in pods}

    def captured() -> bool:
        listed = json.loads(platform.ekiben("predictions", "list", "-d", "chain", "-o", "json").stdout)
        return any(each["replica"] in names for each in listed if each["path"] == "/describe")

    wait_for("the capture", captured, 60)
    assert "Words" in platform.ekiben("deployments", "logs", "chain", "--service", "Words").stdout


def test_an_update_under_load_fails_no_request_and_a_restart_of_the_platform_ends_no_pod(
    cluster: Cluster, namespace: str, platform: Platform, bentoml: BentoMl, bentos: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(bentos / "versions", tmp_path / "versions")
    deploy(bentoml, project, "versions")
    url = json.loads(platform.ekiben("deployments", "get", "versions", "-o", "json").stdout)["urls"][0]
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
        bentoml("deployment", "update", "versions", "--bento", ".", cwd=project, timeout_s=500)
        wait_for("the new version alone", lambda: http("POST", f"{url}/version", b"{}", JSON).body == b"2", 300)
        selector = ("-n", namespace, "-l", "app.kubernetes.io/name=versions")
        wait_for("the old pods gone", lambda: len(cluster.get("pods", *selector)["items"]) == 1, 120)
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failed and seen == {"1", "2"}
    before = [pod["metadata"]["uid"] for pod in cluster.get("pods", *selector)["items"]]
    platform.stop()
    assert [pod["metadata"]["uid"] for pod in cluster.get("pods", *selector)["items"]] == before
    platform.start()
    wait_for("the answer after the restart", lambda: http("POST", f"{url}/version", b"{}", JSON).body == b"2", 60)
    assert [pod["metadata"]["uid"] for pod in cluster.get("pods", *selector)["items"]] == before
    platform.ekiben("deployments", "delete", "versions", "--yes")
    wait_for("nothing left", lambda: not cluster.get("pods,services,deployments", *selector)["items"], 120)
