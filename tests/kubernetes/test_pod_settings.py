"""Pod settings from what users have: `bentoml deploy`, the command line, a file of instance types."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import Cluster
from tests.platform import BentoMl, Platform, http, wait_for

JSON = {"content-type": "application/json"}


def pods(cluster: Cluster, namespace: str, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.get("pods", "-n", namespace, "-l", f"app.kubernetes.io/name={name}")["items"]
    return found


def test_the_client_s_extras_and_the_command_line_lead_to_the_pods(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path: Path,
) -> None:
    name = f"placed-{os.urandom(3).hex()}"
    project = shutil.copytree(bentos / "versions", tmp_path / "versions")
    secret = ("secret", "generic", name, "--from-literal=TOKEN=of-the-cluster", "-n", kubernetes_namespace)
    cluster.kubectl("create", *secret)
    overrides = {
        "annotations": {"team": "a"},
        "extraPodMetadata": {"labels": {"cost": "b"}},
        "extraPodSpec": {"nodeSelector": {"kubernetes.io/hostname": "node-2"}},
    }
    config = tmp_path / "deployment.yaml"
    services = {"Versions": {"extras": {"bento_function_overrides": overrides}}}
    config.write_text(yaml.safe_dump({"name": name, "bento": str(project), "services": services}))
    kubernetes_bentoml("deploy", "-f", str(config), cwd=project, timeout_s=500)
    (pod,) = pods(cluster, kubernetes_namespace, name)
    assert pod["spec"]["nodeName"] == "node-2"
    assert (pod["metadata"]["annotations"]["team"], pod["metadata"]["labels"]["cost"]) == ("a", "b")
    before = kubernetes_platform.ekiben_json("deployments", "get", name)

    wrong = ("deployments", "update", name, "--toleration", "gpu:Sometimes")
    refused = kubernetes_platform.ekiben(*wrong, check=False)
    assert refused.returncode == 1 and "Sometimes" in refused.stderr, refused.stderr
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump({"env_from": [{"secret": name}], "termination_grace": "3s"}))
    closed = kubernetes_platform.ekiben("deployments", "update", name, "--pod", str(file), check=False)
    assert closed.returncode == 1 and f"kubectl label secret {name}" in closed.stderr, closed.stderr
    assert kubernetes_platform.ekiben_json("deployments", "get", name) == before

    cluster.kubectl("label", "secret", name, "ekiben.dev/usable=true", "-n", kubernetes_namespace)
    kubernetes_platform.ekiben("deployments", "update", name, "--pod", str(file), "--request", "cpu=10m", timeout_s=300)

    def moved() -> bool:
        only, *more = pods(cluster, kubernetes_namespace, name)
        (container,) = only["spec"]["containers"]
        return (
            not more
            and container.get("envFrom") == [{"secretRef": {"name": name}}]
            and container["resources"]["requests"]["cpu"] == "10m"
            and only["spec"]["nodeName"] == "node-2"
            and "3" in container["command"]
        )

    wait_for("the new pod alone", moved, 120)
    url = json.loads(kubernetes_platform.ekiben("deployments", "get", name, "-o", "json").stdout)["urls"][0]
    assert http("POST", f"{url}/version", b"{}", JSON).status == 200
    # What its owner takes back no rollback brings again.
    cluster.kubectl("label", "secret", name, "ekiben.dev/usable-", "-n", kubernetes_namespace)
    kubernetes_platform.ekiben("deployments", "rollback", name, "1", "--no-wait")
    taken = kubernetes_platform.ekiben("deployments", "rollback", name, "2", check=False)
    assert taken.returncode == 1 and f"kubectl label secret {name}" in taken.stderr, taken.stderr
    kubernetes_platform.ekiben("deployments", "delete", name, "--yes")
