"""The flags of pod settings."""

from pathlib import Path

import click
import pytest

from ekiben.cli import pods, templates
from ekiben.cli.pods import PodFlags
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.pods_pb2 import Toleration
from ekiben.errors import InvalidArgument

NAMES = ("Front", "Words")


def test_flags_and_files_become_the_settings_of_services(tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("{edge: true, patch: {spec: {hostname: h}}, labels: {a: b}}")
    template = pb.Template()
    flags = PodFlags(
        pod_files=(f"Words={file}",),
        node_selectors=(("disk", "ssd"),),
        tolerations=("gpu", "team=a:NoExecute"),
        requests=(("cpu", "500m"),),
        limits=(("nvidia.com/gpu", "1"),),
    )
    for _ in range(2):
        pods.apply(template, flags, "Front", NAMES)
    front, words = (template.services[name].pod for name in NAMES)
    assert dict(front.node_selector) == dict(words.node_selector) == {"disk": "ssd"}
    assert list(front.tolerations) == [
        Toleration(key="gpu", operator="Exists"),
        Toleration(key="team", operator="Equal", value="a", effect="NoExecute"),
    ]
    assert dict(front.resources.requests) == {"cpu": "500m"} and dict(front.resources.limits) == {"nvidia.com/gpu": "1"}
    assert words.edge and words.patch["spec"]["hostname"] == "h" and not words.HasField("resources")
    assert '"node_selector": {"disk": "ssd"}' in pods.shown(template).splitlines()[0]
    untouched = pb.Template()
    pods.apply(untouched, pods.NONE_GIVEN, "Front", NAMES)
    assert untouched == pb.Template()


def test_amounts_may_be_numbers(tmp_path: Path) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text("{resources: {requests: {cpu: 0.5}, limits: {cpu: 4, memory: 1Gi}}}")
    resources = pods.read(file).resources
    assert dict(resources.requests) == {"cpu": "0.5"} and dict(resources.limits) == {"cpu": "4", "memory": "1Gi"}
    file.write_text("{template: {services: {Front: {pod: {resources: {limits: {nvidia.com/gpu: 1}}}}}}}")
    front = templates.read_file(file).template.services["Front"]
    assert dict(front.pod.resources.limits) == {"nvidia.com/gpu": "1"}


@pytest.mark.parametrize("text", ["{nodes: 1}", "[1]", "3", "{edge: ["])
def test_a_file_that_has_no_pod_settings_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        pods.read(file)
    assert caught.value.reason == "FILE_INVALID"


def test_a_service_that_the_bento_does_not_have_is_refused() -> None:
    with pytest.raises(click.UsageError):
        pods.apply(pb.Template(), PodFlags(pod_files=("Other=x.yaml",)), "Front", NAMES)
