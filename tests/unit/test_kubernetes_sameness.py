"""Whether what lives in a cluster is what was asked."""

from copy import deepcopy
from typing import Any

import pytest

from services.deployer.runtimes.kubernetes.sameness import holds, print_of

LIVE: dict[str, Any] = {
    "kind": "Deployment",
    "metadata": {"name": "a", "labels": {"x": "1", "foreign": "y"}, "resourceVersion": "7", "generation": 2},
    "spec": {
        "replicas": 2,
        "paused": False,
        "template": {
            "containers": [
                {"name": "sidecar"},
                {"name": "bento", "command": ["a", "b"], "resources": {"limits": {"cpu": "1", "memory": "2Gi"}}},
            ]
        },
    },
    "status": {"replicas": 1},
}
WANTED: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "a", "labels": {"x": "1"}},
    "spec": {
        "template": {
            "containers": [
                {
                    "name": "bento",
                    "command": ["a", "b"],
                    "resources": {"limits": {"cpu": "1000m", "memory": str(2 << 30)}},
                    "env": [],
                    "stdin": False,
                }
            ]
        },
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    found: Any = deepcopy(LIVE)
    *above, last = path.split(".")
    inner = found
    for step in above:
        inner = inner[int(step) if step.isdigit() else step]
    inner[last] = value
    return dict(found)


def test_what_the_cluster_and_others_add_is_no_difference() -> None:
    assert holds(LIVE, WANTED)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.labels", {"foreign": "y"}),
        ("spec.template.containers.1.command", ["a", "b", "c"]),
        ("spec.template.containers.1.resources", {"limits": {"cpu": "2", "memory": "2Gi"}}),
        ("spec.template.containers.1.resources", {}),
        ("spec.template.containers", [{"name": "sidecar"}]),
        ("spec.template.containers", None),
        ("spec", "gone"),
    ],
)
def test_what_is_missing_or_another_is_a_difference(path: str, value: Any) -> None:
    assert not holds(changed(path, value), WANTED)


def test_a_print_tells_of_all_but_status_and_what_every_write_changes() -> None:
    assert print_of(LIVE) == print_of(changed("status", {"replicas": 2}))
    assert print_of(LIVE) == print_of(changed("metadata.resourceVersion", "8"))
    assert print_of(LIVE) != print_of(changed("spec.replicas", 3))
    assert print_of(LIVE) != print_of(changed("metadata.labels", {}))
