"""What the flags of `deployments create` and `update` make of a deployment: all that they set they take back too."""

from typing import Any

import click
import pytest

from ekiben.cli import templates
from ekiben.cli.templates import Flags, Services
from ekiben.deployer.v1 import deployer_pb2 as pb

SERVICES = Services("Front", ("Front", "Words"))


def flags(*arguments: str) -> Flags:
    """As the command line gives them."""

    @click.command()
    @templates.flag_options
    def command(**given: Any) -> Flags:
        return Flags.take(given)

    found = command.main(list(arguments), standalone_mode=False)
    assert isinstance(found, Flags)
    return found


def deployment() -> pb.Deployment:
    """One that has a little of everything already."""
    found = pb.Deployment(labels={"kept": "1"}, access_authorization=True)
    found.template.bento = "bentoRepositories/chain/bentos/v1"
    found.template.envs.add(name="KEPT", value="1")
    found.template.secrets.append("secrets/kept")
    front = found.template.services["Front"]
    front.pod.node_selector["kept"] = "1"
    front.pod.resources.limits["cpu"] = "1"
    front.config_overrides.update({"traffic": {"concurrency": 4}})
    found.scaling["Front"].autoscaling.policy = "hpa"
    return found


CHANGES = [
    (("--env", "A=1"), ("--env", "A-")),
    (("--secret", "hub"), ("--secret", "hub-")),
    (("--label", "team=a"), ("--label", "team-")),
    (("--replicas", "Words=3"), ("--replicas", "Words=default")),
    (("--instance-type", "Words=cpu.2"), ("--instance-type", "Words=")),
    (("--config-override", "Front.traffic.timeout=30"), ("--config-override", "Front.traffic.timeout-")),
    (("--config-override", "Words.logging.access.enabled=no"), ("--config-override", "Words.logging.access.enabled-")),
    (("--strategy", "Recreate"), ("--strategy", "default")),
    (("--capture-percent", "5"), ("--capture-percent", "default")),
    (("--capture-body-bytes", "10"), ("--capture-body-bytes", "default")),
    (("--redact", "X-Key"), ("--redact", "x-key-")),
    (("--no-capture",), ("--capture",)),
    (("--no-access-authorization",), ("--access-authorization",)),
    (("--image", "example.com/a:1", "--image-pull-secret", "login"), ("--image", "")),
    (("--model-delivery", "image-volume"), ("--model-delivery", "default")),
    (("--node-selector", "disk=ssd"), ("--node-selector", "disk-")),
    (("--toleration", "gpu=a:NoExecute"), ("--toleration", "gpu=a:NoExecute-")),
    (("--toleration", "nvidia.com/gpu"), ("--toleration", "nvidia.com/gpu-")),
    (("--request", "cpu=500m"), ("--request", "cpu-")),
    (("--limit", "nvidia.com/gpu=1"), ("--limit", "nvidia.com/gpu-")),
    (("--scale", "Words=1-8"), ("--scale", "Words=default")),
    (("--scale-policy", "Words=external"), ("--scale-policy", "Words=default")),
    (("--scale-by", "cpu=60%", "--scale-by", "memory=2Gi"), ("--scale-by", "default")),
    (("--scale-up-window", "1m"), ("--scale-up-window", "default")),
    (("--scale-down-window", "0s"), ("--scale-down-window", "default")),
    (("--expose", "ingress", "--expose-tls"), ("--expose", "default")),
]


@pytest.mark.parametrize(("there", "back"), CHANGES, ids=[" ".join(there) for there, _ in CHANGES])
def test_what_a_flag_sets_a_flag_takes_back(there: tuple[str, ...], back: tuple[str, ...]) -> None:
    changed = deployment()
    assert templates.apply(changed, flags(*there), SERVICES)
    assert templates.apply(changed, flags(*back), SERVICES)
    assert changed == deployment()
    assert templates.apply(changed, flags(*back), SERVICES) == []


def test_of_an_exposure_each_thing_is_taken_back() -> None:
    kind = ("--expose", "http-route")
    changed, plain = deployment(), deployment()
    templates.apply(plain, flags(*kind), SERVICES)
    given = [f"--expose-{name}" for name in ("host", "path", "class", "gateway")]
    annotated = ("--expose-annotation", "a=1", "--expose-tls-secret", "s", "--expose-issuer", "i")
    templates.apply(changed, flags(*kind, *(word for each in given for word in (each, "x")), *annotated), SERVICES)
    assert changed.exposure.gateways and changed.exposure.tls.issuer == "i" and changed.exposure.class_name == "x"
    emptied = (*(word for each in given for word in (each, "")), "--expose-annotation", "a-", "--no-expose-tls")
    templates.apply(changed, flags(*emptied), SERVICES)
    assert changed == plain


def test_all_pod_settings_of_a_service_are_taken_back() -> None:
    changed, wanted = deployment(), deployment()
    templates.apply(changed, flags("--pod", ""), SERVICES)
    wanted.template.services["Front"].ClearField("pod")
    assert changed == wanted


def test_what_is_so_already_changes_nothing() -> None:
    changed = deployment()
    changed.template.secrets.append("secrets/other")
    changed.template.services["Words"].pod.SetInParent()
    same = ("--secret", "kept", "--label", "kept=1", "--node-selector", "gone-", "--scale-by", "default")
    assert templates.apply(changed, flags(*same, "--limit", "cpu=1", "--scale-policy", "hpa"), SERVICES) == []


@pytest.mark.parametrize("word", ["A", "-", "=1", ""])
def test_what_neither_sets_nor_takes_back_is_refused(word: str) -> None:
    with pytest.raises(click.UsageError, match="KEY-"):
        flags("--env", word)
