"""What nodes pull from the platform's own `/v2/`, with logins that it makes itself: each layer once, models apart."""

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
SPREAD = """
bento: modelled:layers
name: modelled
template: {services: {Modelled: {pod: {topology_spread: [
    {topology_key: kubernetes.io/hostname, max_skew: 1, when_unsatisfiable: DoNotSchedule}]}}}}
scaling: {Modelled: {min_replicas: 2, max_replicas: 2}}
"""


@pytest.fixture(scope="module")
def bento(kubernetes_bentoml: BentoMl, bentos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`modelled:layers` and `remodelled:layers` in the registry, with one model, which no node has."""
    folder = tmp_path_factory.mktemp("layers")
    for service in ("Modelled", "Remodelled"):
        project = shutil.copytree(bentos / "modelled", folder / service)
        for file in ("service.py", "bentofile.yaml"):
            (project / file).write_text((project / file).read_text().replace("Modelled", service))
        if service == "Modelled":
            (project / "make_model.py").write_text(MAKE)
            run([str(kubernetes_bentoml.bin / "python"), "make_model.py"], env=kubernetes_bentoml.env, cwd=project)
        kubernetes_bentoml("build", ".", "--version", "layers", cwd=project)
        kubernetes_bentoml("push", f"{service.lower()}:layers")


def bytes_served(platform: Platform) -> float:
    """Of all blobs that nodes were given."""
    text = http("GET", f"{platform.url}/metrics", headers={"authorization": f"Bearer {platform.token}"}).body.decode()
    return sum(float(found) for found in re.findall(r"^ekiben_image_bytes_total(?:{[^}]*})? (\S+)$", text, re.M))


def create(platform: Platform, *arguments: str) -> None:
    platform.ekiben("deployments", "create", "--timeout", "8m", *arguments, timeout_s=500)


def answers(platform: Platform, name: str) -> None:
    url = json.loads(platform.ekiben("deployments", "get", name, "-o", "json").stdout)["urls"][0]
    answer = http("POST", f"{url}/predict", b'{"x": 2}', JSON)
    assert (answer.status, answer.body) == (200, b"6.0"), answer.body


def pods(cluster: Cluster, namespace: str, name: str) -> list[dict[str, Any]]:
    found = cluster.get("pods", "-n", namespace, "-l", f"app.kubernetes.io/name={name}")["items"]
    return [each for each in found if not each["metadata"].get("deletionTimestamp")]


@pytest.mark.usefixtures("bento")
def test_both_nodes_pull_and_another_bento_with_the_same_model_costs_only_its_own(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform, tmp_path: Path
) -> None:
    platform = kubernetes_platform
    (tmp_path / "spread.yaml").write_text(SPREAD)
    served = [bytes_served(platform)]
    for name, how in (("modelled", ["--file", str(tmp_path / "spread.yaml")]), ("remodelled", ["remodelled:layers"])):
        create(platform, *how, "--name", name)
        answers(platform, name)
        served.append(bytes_served(platform))
    there = pods(cluster, kubernetes_namespace, "modelled")
    assert len({pod["spec"]["nodeName"] for pod in there}) == 2
    assert {pod["spec"]["imagePullSecrets"][0]["name"].rpartition("-")[0] for pod in there} == {"ekiben-images"}
    assert served[1] - served[0] >= 2 * WEIGHTS
    # The configuration and the layer of the bento itself.
    assert served[2] - served[1] < 256 << 10, served
    platform.ekiben("deployments", "delete", "remodelled", "--yes")


@pytest.mark.usefixtures("bento")
def test_models_are_mounted_as_images_that_cost_nothing_where_their_layer_is(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform
) -> None:
    platform, before = kubernetes_platform, bytes_served(kubernetes_platform)
    create(platform, "modelled:layers", "--name", "mounted", "--model-delivery", "image-volume")
    answers(platform, "mounted")
    (pod,) = pods(cluster, kubernetes_namespace, "mounted")
    (volume,) = [each for each in pod["spec"]["volumes"] if "image" in each]
    (mount,) = [each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == volume["name"]]
    repository = pod["spec"]["containers"][0]["image"].partition("@")[0]
    assert volume["image"]["reference"].startswith(f"{repository}@sha256:") and mount["readOnly"]
    assert "/home/bentoml/bento/models/weights/" in mount["mountPath"]
    # The test before had both nodes pull the model's layer.
    assert bytes_served(platform) - before < 256 << 10
    platform.ekiben("deployments", "delete", "mounted", "--yes")


@pytest.mark.usefixtures("bento")
def test_a_prebuilt_image_runs_as_it_is_with_a_login_that_may_be_used(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform
) -> None:
    platform = kubernetes_platform
    (image,) = {pod["spec"]["containers"][0]["image"] for pod in pods(cluster, kubernetes_namespace, "modelled")}
    token = json.loads(platform.ekiben("tokens", "create", "own", "--role", "viewer", "-o", "json").stdout)["token"]
    login = (f"--docker-server={image.partition('/')[0]}", "--docker-username=own", f"--docker-password={token}")
    cluster.kubectl("create", "secret", "docker-registry", "own", "-n", kubernetes_namespace, *login)
    given = ("modelled:layers", "--name", "given", "--image", image, "--image-pull-secret", "own")
    refused = platform.ekiben("deployments", "create", *given, check=False)
    assert refused.returncode and "does not say that deployments may use it" in refused.stderr
    cluster.kubectl("label", "secret", "own", "-n", kubernetes_namespace, f"{USABLE}=true")
    before = len(json.loads(platform.ekiben("builds", "list", "-o", "json").stdout))
    create(platform, *given)
    answers(platform, "given")
    (pod,) = pods(cluster, kubernetes_namespace, "given")
    assert pod["spec"]["containers"][0]["image"] == image
    assert pod["spec"]["imagePullSecrets"][0] == {"name": "own"}
    assert len(json.loads(platform.ekiben("builds", "list", "-o", "json").stdout)) == before
    found = json.loads(platform.ekiben("deployments", "get", "given", "-o", "json").stdout)
    assert found["template"]["image"]["reference"] == f"docker://{image}" and not found.get("build")
    for name in ("modelled", "given"):
        platform.ekiben("deployments", "delete", name, "--yes")
    wait_for("no pods", lambda: not pods(cluster, kubernetes_namespace, "given"), 60)
