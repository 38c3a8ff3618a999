"""Instance types of the settings and of a file."""

from pathlib import Path

import pytest

from services.deployer import instances
from services.deployer.quantities import quantity
from services.kernel.settings import SettingsError

FILE = """
- name: gpu.mig
  description: One seventh of an A100
  group: gpu
  price: "0.4"
  gpu_type: a100
  resources:
    requests: {cpu: 2, memory: 8Gi}
    limits: {cpu: 4, memory: 16Gi, nvidia.com/mig-1g.5gb: 1}
  nodeSelector: {pool: gpu}
  tolerations: [{key: nvidia.com/gpu, operator: Exists}]
  runtime_class: nvidia
- name: cpu.1
  resources: {requests: {cpu: 100m}}
"""


def test_a_file_has_all_that_a_pod_has(tmp_path: Path) -> None:
    file = tmp_path / "types.yaml"
    file.write_text(FILE)
    found = instances.load(("cpu.1=1/2Gi", "gpu=1/2Gi/2", "amd=1/2Gi/1/amd.com/gpu"), file)
    assert list(found) == ["cpu.1", "gpu", "amd", "gpu.mig"]
    one = found["gpu.mig"]
    assert (one.cpu_millicores, one.memory_bytes, one.gpu_count, one.gpu_type) == (4000, 16 << 30, 1, "a100")
    assert (one.group, one.price, one.pod.runtime_class) == ("gpu", "0.4", "nvidia")
    assert dict(one.pod.node_selector) == {"pool": "gpu"}
    assert dict(one.pod.resources.limits)["nvidia.com/mig-1g.5gb"] == "1"
    assert found["cpu.1"].cpu_millicores == 100 and found["cpu.1"].memory_bytes == 0
    assert dict(found["gpu"].pod.resources.limits) == {"nvidia.com/gpu": "2"}
    assert dict(found["amd"].pod.resources.limits) == {"amd.com/gpu": "1"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- resources: {}", "has no name"),
        ("- {name: a, resources: {limits: {cpu: much}}}", "no quantity"),
        ("- {name: a, node_selectors: {a: b}}", "node_selectors"),
        ("- {name: a, patch: {spec: {}}}", "belongs to a deployment"),
        (
            "- {name: a, labels: {app.kubernetes.io/instance: b}}",
            "labels[app.kubernetes.io/instance]: only the platform",
        ),
        ("a: b", "no list"),
        ("[", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_at_the_start(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "types.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        instances.load((), file)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("500m", "0.5"), ("2", "2"), ("1.5Gi", str(3 << 29)), ("1e3", "1000"), ("2E", "2e18"), ("3k", "3000")],
)
def test_quantities(text: str, amount: str) -> None:
    assert quantity(text) == quantity(amount)


@pytest.mark.parametrize("text", ["", "Gi", "-1", "1GiB", "NaN", "1,5"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match=r"quantity|amount"):
        quantity(text)
