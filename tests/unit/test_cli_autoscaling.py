"""The flags that say how a service is scaled."""

import click
import pytest

from ekiben.cli import autoscaling
from ekiben.cli.autoscaling import ScalingFlags
from ekiben.cli.templates import Services
from ekiben.deployer.v1 import deployer_pb2 as pb

SERVICES = Services("Chain", ("Chain", "Words"))


def applied(**flags: object) -> pb.Deployment:
    deployment = pb.Deployment()
    autoscaling.apply(deployment, ScalingFlags(**flags), SERVICES.split, SERVICES.entry)  # type: ignore[arg-type]
    return deployment


def test_bounds_policy_metrics_and_windows_go_where_they_are_named() -> None:
    found = applied(
        scale=("1-5", "Words=2-3"),
        scale_policy=("Words=external",),
        scale_by=("cpu=60%", "memory=2Gi", "external/queue=30"),
        scale_down_window=30.0,
    )
    chain, words = found.scaling["Chain"], found.scaling["Words"]
    assert (chain.min_replicas, chain.max_replicas, words.min_replicas) == (1, 5, 2)
    assert words.autoscaling.policy == "external"
    cpu, memory, queue = chain.autoscaling.metrics
    assert (cpu.average_utilization_percent, memory.average_value) == (60, "2Gi")
    assert (queue.source, queue.name, queue.average_value) == ("external", "queue", "30")
    assert chain.autoscaling.scale_down.stabilization_window.seconds == 30
    assert applied(scale_by=("Words:pods/qps=10",)).scaling["Words"].autoscaling.metrics[0].name == "qps"


@pytest.mark.parametrize(
    "flags",
    [{"scale": ("5",)}, {"scale_by": ("disk=1",)}, {"scale_by": ("cpu",)}, {"scale": ("Nobody=1-2",)}],
)
def test_what_is_no_such_flag_is_said(flags: dict[str, object]) -> None:
    with pytest.raises(click.UsageError):
        applied(**flags)
