"""What nodes pull from the platform's own `/v2/`, with logins that it makes itself: each layer once."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.deployer.runtimes.kubernetes.placement import USABLE
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


def test_models_are_mounted_as_images_and_a_prebuilt_image_runs_as_it_is(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    modelled: Path,
) -> None:
    platform = kubernetes_platform
    kubernetes_bentoml("build", ".", "--version", "mounted", cwd=modelled)
    kubernetes_bentoml("push", "modelled:mounted")
    create = ("deployments", "create", "modelled:mounted", "--timeout", "5m")
    platform.ekiben(*create, "--name", "mounted", "--model-delivery", "image-volume")
    answers(platform, "mounted")
    (pod,) = pods(cluster, kubernetes_namespace, "mounted")
    (volume,) = [each for each in pod["spec"]["volumes"] if "image" in each]
    (mount,) = [each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == volume["name"]]
    repository, _, digest = pod["spec"]["containers"][0]["image"].partition("@")
    assert volume["image"]["reference"].startswith(f"{repository}@sha256:") and mount["readOnly"]
    assert "/home/bentoml/bento/models/weights/" in mount["mountPath"]

    # The same image from the nodes' point of view, with nothing built: by its digest, which nobody looks up here.
    before = len(json.loads(platform.ekiben("builds", "list", "-o", "json").stdout))
    images = json.loads(platform.ekiben("images", "list", "-o", "json").stdout)
    assert [each for each in images if each["digest"] == digest]
    platform.ekiben("builds", "create", "modelled:mounted", "--image")
    whole = next(
        each
        for each in json.loads(platform.ekiben("images", "list", "-o", "json").stdout)
        if each["digest"] != digest and each["bento"].endswith("/mounted")
    )
    given, create_given = f"{repository}@{whole['digest']}", (*create, "--name", "given", "--image-pull-secret", "own")
    token = json.loads(platform.ekiben("tokens", "create", "own", "--role", "viewer", "-o", "json").stdout)["token"]
    login = (f"--docker-server={repository.partition('/')[0]}", "--docker-username=own", f"--docker-password={token}")
    cluster.kubectl("create", "secret", "docker-registry", "own", "-n", kubernetes_namespace, *login)
    refused = platform.ekiben(*create_given, "--image", given, check=False)
    assert "does not say that deployments may use it" in refused.stderr
    cluster.kubectl("label", "secret", "own", "-n", kubernetes_namespace, f"{USABLE}=true")
    platform.ekiben(*create_given, "--image", given)
    answers(platform, "given")
    (pod,) = pods(cluster, kubernetes_namespace, "given")
    assert pod["spec"]["containers"][0]["image"] == given
    assert not [each for each in pod["spec"]["volumes"] if "image" in each]
    assert len(json.loads(platform.ekiben("builds", "list", "-o", "json").stdout)) == before + 1
    found = json.loads(platform.ekiben("deployments", "get", "given", "-o", "json").stdout)
    assert found["template"]["image"]["reference"] == f"docker://{given}" and not found.get("build")
    for name in ("mounted", "given"):
        platform.ekiben("deployments", "delete", name, "--yes")
