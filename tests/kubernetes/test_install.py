"""The chart by real helm on a real cluster: installed, used with the real client, upgraded, rolled back, uninstalled."""

import shutil
from pathlib import Path

import pytest

from tests import installing
from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.helm import CHART, MISSING, Helm, helm_program
from tests.oci_registry import OciRegistry
from tests.platform import BentoMl, http

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def helm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm, as the cluster's administrator."""
    program = helm_program()
    if program is None:
        pytest.skip(MISSING)
    return Helm(program, tmp_path_factory.mktemp("helm"), cluster.kubeconfig)


@pytest.fixture(scope="module")
def image(oci_registry: OciRegistry, pull_host: str) -> str:
    """The platform's own image, made by its own builder, as nodes call it."""
    repository = oci_registry.new_repository("ekiben")
    digest = installing.platform_image(f"docker://{oci_registry.host}/{repository}:v1", oci_registry.host)
    return f"{pull_host}/{repository}@{digest}"


def test_from_an_empty_namespace_to_a_served_bento_and_away_again(
    cluster: Cluster, helm: Helm, image: str, bentos: Path, tmp_path: Path
) -> None:
    with new_namespace(cluster, "install") as namespace, installing.volume(cluster, namespace, "data-ekiben-0") as data:
        shutil.copytree(base_image().removeprefix("oci:"), data / "bases")
        shutil.copytree(installing.wheels(), data / "wheels")
        repository, _, digest = image.partition("@")
        node_port = installing.free_node_port(cluster)
        given = {
            "image": {"repository": repository, "digest": digest},
            "images": {"nodePort": node_port, "bases": "oci:/var/lib/ekiben/bases"},
            # Pods of the test's cluster reach no package index.
            "env": {"UV_OFFLINE": "1", "UV_FIND_LINKS": "/var/lib/ekiben/wheels", "EKIBEN_DEPLOYER_DRAIN_S": "2"},
            "persistence": {"size": "1Gi"},
            "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
        }
        values = installing.written(tmp_path / "values.yaml", given)
        with installing.told(cluster, namespace):
            helm("install", "ekiben", str(CHART), "-n", namespace, "-f", str(values), "--wait", "--timeout", "3m")
            address = cluster.get("service", "ekiben", "-n", namespace)["spec"]["clusterIP"]
            token = cluster.kubectl(
                "exec", "-n", namespace, "ekiben-0", "--", "cat", "/var/lib/ekiben/admin-token"
            ).strip()
            bentoml = BentoMl(client("1.4"), tmp_path / "client")
            bentoml("cloud", "login", "--endpoint", f"http://{address}", "--api-token", token)
            project = shutil.copytree(bentos / "chain", tmp_path / "chain")
            bentoml("deploy", ".", "-n", "chain", cwd=project, timeout_s=500)
            host = {**JSON, "host": "chain-default.localhost"}
            answer = http("POST", f"http://{address}/describe", b'{"text": "two words"}', host)
            assert (answer.status, answer.json()) == (200, {"words": 2, "letters": 9}), answer.body
