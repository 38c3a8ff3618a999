"""Seeing in: what is wrong in words, the cluster's events, logs of the run before; what the client's pods say."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.platform import BentoMl, Platform, http, wait_for

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def moody(
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A deployment whose replica can be told to be unready, or to end."""
    name = f"moody-{os.urandom(2).hex()}"
    project = shutil.copytree(bentos / "moody", tmp_path_factory.mktemp("moody") / "moody")
    kubernetes_bentoml("deploy", ".", "-n", name, cwd=project, timeout_s=500)
    yield name
    kubernetes_platform.ekiben("deployments", "delete", name, "--yes", "--no-wait")


def described(platform: Platform, name: str) -> Any:
    return platform.ekiben_json("deployments", "get", name)


def conditions(platform: Platform, name: str) -> str:
    return " ".join(each.get("message", "") for each in described(platform, name)["conditions"])


def replicas(platform: Platform, name: str) -> list[Any]:
    found: list[Any] = platform.ekiben_json("deployments", "replicas", name)
    return found


def test_events_tell_what_the_cluster_did(kubernetes_platform: Platform, moody: str) -> None:
    lines = kubernetes_platform.ekiben("deployments", "events", moody, "-o", "json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    assert {"Scheduled", "Started"} <= {event["reason"] for event in events if event.get("replica") == replica}
    assert "ScalingReplicaSet" in {event["reason"] for event in events if event["object"].startswith("Deployment/")}
    times = [event["time"][:19] for event in events]
    assert times == sorted(times)


def test_the_log_of_the_run_before_is_kept(kubernetes_platform: Platform, moody: str) -> None:
    url = described(kubernetes_platform, moody)["urls"][0]
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    previous = ("deployments", "logs", moody, "--replica", replica, "--previous", "--tail", "-1")
    assert kubernetes_platform.ekiben(*previous).stdout == ""
    http("POST", f"{url}/leave", b"{}", JSON)

    def back() -> bool:
        (now,) = replicas(kubernetes_platform, moody)
        return bool(now["state"] == "READY" and now.get("restartCount"))

    wait_for("the container that is started again", back, 90)
    assert "I leave" in kubernetes_platform.ekiben(*previous).stdout
    unknown = kubernetes_platform.ekiben("deployments", "logs", moody, "--replica", "nobody", check=False)
    assert unknown.returncode == 1 and "There is no replica nobody" in unknown.stderr
    refused = kubernetes_platform.ekiben("deployments", "logs", moody, "--previous", "--follow", check=False)
    assert "does not grow" in refused.stderr


def test_an_unready_replica_says_what_its_probe_was_answered(kubernetes_platform: Platform, moody: str) -> None:
    url = described(kubernetes_platform, moody)["urls"][0]
    assert http("POST", f"{url}/sulk", b"{}", JSON).status == 200
    wait_for("the answer of its probe", lambda: "probe with 503" in conditions(kubernetes_platform, moody), 90)
    assert [each["state"] for each in replicas(kubernetes_platform, moody)] == ["UNREADY"]
    warnings = kubernetes_platform.ekiben("deployments", "events", moody, "--warnings").stdout
    assert "Unhealthy" in warnings and "503" in warnings


def test_a_quota_that_is_used_up_is_a_condition(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform, moody: str
) -> None:
    metadata = {"name": "nothing-more", "namespace": kubernetes_namespace}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": {"pods": "0"}}}
    cluster.kubectl("apply", "-f", "-", input=json.dumps(quota))
    try:
        kubernetes_platform.ekiben("deployments", "scale", moody, "2", "--no-wait")
        wait_for("the quota", lambda: "quota is used up" in conditions(kubernetes_platform, moody), 60)
        assert "exceeded quota: nothing-more" in conditions(kubernetes_platform, moody)
    finally:
        cluster.kubectl("delete", "resourcequota", "nothing-more", "-n", kubernetes_namespace)
