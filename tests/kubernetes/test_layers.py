"""What nodes pull from the platform's own `/v2/`, with logins that it makes itself: each layer once."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.platform import BentoMl, Platform, http, run, wait_for

JSON = {"content-type": "application/json"}
WEIGHTS = 8 << 20
MAKE = f"""
import json, os
from pathlib import Path
import bentoml
with bentoml.models.create("weights") as model:
    (Path(model.path) / "weights.json").write_text(json.dumps({{"factor": 3.0}}))
    (Path(model.path) / "weights.bin").write_bytes(os.urandom({WEIGHTS}))
"""


@pytest.fixture(scope="module")
def modelled(kubernetes_bentoml: BentoMl, bentos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose bento has a model that no node has."""
    project = shutil.copytree(bentos / "modelled", tmp_path_factory.mktemp("layers") / "modelled")
    (project / "make_model.py").write_text(MAKE)
    run([str(kubernetes_bentoml.bin / "python"), "make_model.py"], env=kubernetes_bentoml.env, cwd=project)
    return project


def bytes_served(platform: Platform) -> float:
    text = http("GET", f"{platform.url}/metrics", headers={"authorization": f"Bearer {platform.token}"}).body.decode()
    return sum(float(found) for found in re.findall(r"^ekiben_image_bytes_total(?:{[^}]*})? (\S+)$", text, re.M))


def answers(platform: Platform, name: str) -> None:
    url = json.loads(platform.ekiben("deployments", "get", name, "-o", "json").stdout)["urls"][0]
    answer = http("POST", f"{url}/predict", b'{"x": 2}', JSON)
    assert (answer.status, answer.body) == (200, b"6.0"), answer.body


def pods(cluster: Cluster, namespace: str, name: str) -> list[dict[str, Any]]:
    found = cluster.get("pods", "-n", namespace, "-l", f"app.kubernetes.io/name={name}")["items"]
    return [each for each in found if not each["metadata"].get("deletionTimestamp")]


def test_both_nodes_pull_and_a_second_bento_with_the_same_model_costs_only_its_own(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    modelled: Path,
    tmp_path: Path,
) -> None:
    platform = kubernetes_platform
    pulled = []
    for service in ("Modelled", "Remodelled"):
        before = bytes_served(platform)
        project = shutil.copytree(modelled, tmp_path / service)
        for file in ("service.py", "bentofile.yaml"):
            (project / file).write_text((project / file).read_text().replace("Modelled", service))
        name = service.lower()
        kubernetes_bentoml("deploy", ".", "-n", name, cwd=project, timeout_s=500)
        platform.ekiben("deployments", "scale", name, "2")

        def on_both() -> bool:
            ready = [
                pod
                for pod in pods(cluster, kubernetes_namespace, name)
                if any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"]["conditions"])
            ]
            return len(ready) == 2 and len({pod["spec"]["nodeName"] for pod in ready}) == 2

        wait_for("pods on both nodes", on_both, 120)
        answers(platform, name)
        pulled.append(bytes_served(platform) - before)
        (secrets,) = {pod["spec"]["imagePullSecrets"][0]["name"] for pod in pods(cluster, kubernetes_namespace, name)}
        assert secrets.startswith("ekiben-images-")
        platform.ekiben("deployments", "delete", name, "--yes")
    assert pulled[0] >= 2 * WEIGHTS
    # The configuration and the layer of the bento itself, for each node.
    assert pulled[1] < 2 * (256 << 10), pulled
