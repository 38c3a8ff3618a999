"""Pod security levels, as far as a cluster that enforces restricted cannot show."""

from typing import Any

import pytest

from services.deployer.runtimes.kubernetes.security import faults


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {}, "spec": {"containers": [{"name": "bento"}], **spec}}


def test_each_level_allows_more_than_the_one_before() -> None:
    assert not faults(pod(), "baseline") and len(faults(pod(), "restricted")) == 4
    host = pod(hostNetwork=True, volumes=[{"name": "root", "hostPath": {"path": "/"}}])
    assert faults(host, "baseline") == ["hostNetwork", "volume root is a hostPath"]
    assert not faults(host, "privileged")
    unconfined = {
        **pod(),
        "metadata": {"annotations": {"container.apparmor.security.beta.kubernetes.io/bento": "unconfined"}},
    }
    assert len(faults(unconfined, "baseline")) == 1


@pytest.mark.parametrize(
    "spec",
    [
        {"containers": 3},
        {"containers": [None]},
        {"volumes": [3]},
        {"securityContext": []},
        {"securityContext": {"sysctls": 1}},
        {
            "containers": [
                {"name": "a", "securityContext": {"capabilities": {"add": "ALL"}}, "lifecycle": {"preStop": 1}}
            ]
        },
    ],
)
def test_what_is_no_pod_is_left_to_the_cluster(spec: dict[str, Any]) -> None:
    faults(pod(**spec), "restricted")
