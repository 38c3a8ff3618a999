"""The flags that say how a cluster scales a service by itself."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

import click

from ekiben.cli.options import DEFAULT, DURATION, OrDefault
from ekiben.deployer.v1 import autoscaling_pb2
from ekiben.deployer.v1 import deployer_pb2 as pb

F = TypeVar("F", bound=Callable[..., Any])
Split = Callable[[str, str], tuple[str, str]]
"""Takes `[SERVICE=]VALUE` and the option's name apart."""

_SOURCES = ("pods", "external")


@dataclass(frozen=True)
class ScalingFlags:
    """As click gives them; None and empty mean not given."""

    scale: tuple[str, ...] = ()
    scale_policy: tuple[str, ...] = ()
    scale_by: tuple[str, ...] = ()
    scale_up_window: float | str | None = None
    scale_down_window: float | str | None = None

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> "ScalingFlags":
        """Take the flags out of a command's arguments."""
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})


NONE_GIVEN = ScalingFlags()


def scaling_options(function: F) -> F:
    """The flags."""
    options = [
        click.option(
            "--scale", multiple=True, metavar="[SERVICE=]MIN-MAX|default", help="How few and how many replicas."
        ),
        click.option(
            "--scale-policy",
            multiple=True,
            metavar="[SERVICE=]POLICY|default",
            help="Who scales between them: hpa, none, or external for an autoscaler of yours.",
        ),
        click.option(
            "--scale-by",
            multiple=True,
            metavar="[SERVICE:]METRIC=TARGET|default",
            help="What by: cpu=60%, memory=2Gi, pods/NAME=10, external/NAME=30. Replaces the metrics of before.",
        ),
        *(
            click.option(
                f"--scale-{way}-window",
                type=OrDefault(DURATION),
                metavar="DURATION|default",
                help=f"How long a {use} use must last.",
            )
            for way, use in (("up", "higher"), ("down", "lower"))
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def apply(deployment: pb.Deployment, flags: ScalingFlags, split: Split, entry: str) -> None:
    """Change a deployment's scaling as the flags say.

    Raises:
        click.UsageError: a flag is not as it must be.
    """
    for word in flags.scale:
        service, text = split(word, "--scale")
        scaling = deployment.scaling[service]
        if text == DEFAULT:
            scaling.ClearField("min_replicas")
            scaling.ClearField("max_replicas")
            continue
        bounds = re.fullmatch(r"(\d+)-(\d+)", text)
        if bounds is None:
            raise click.UsageError(f"--scale: {text!r} is neither MIN-MAX nor {DEFAULT}.")
        scaling.min_replicas, scaling.max_replicas = int(bounds[1]), int(bounds[2])
    for word in flags.scale_policy:
        service, policy = split(word, "--scale-policy")
        deployment.scaling[service].autoscaling.policy = "" if policy == DEFAULT else policy
    metrics: dict[str, list[autoscaling_pb2.ScalingMetric]] = {}
    for word in flags.scale_by:
        service, colon, text = word.partition(":")
        if colon:
            service, _ = split(f"{service}=", "--scale-by")
        found = metrics.setdefault(service if colon else entry, [])
        if (text if colon else word) != DEFAULT:
            found.append(_metric(text if colon else word))
    for service, found in metrics.items():
        del deployment.scaling[service].autoscaling.metrics[:]
        deployment.scaling[service].autoscaling.metrics.extend(found)
    for window, way in ((flags.scale_up_window, "scale_up"), (flags.scale_down_window, "scale_down")):
        if window is not None:
            for service in _touched(flags, metrics, split) or [entry]:
                rules = getattr(deployment.scaling[service].autoscaling, way)
                if isinstance(window, str):
                    rules.ClearField("stabilization_window")
                else:
                    rules.stabilization_window.FromTimedelta(timedelta(seconds=window))


def tidy(scaling: pb.Scaling) -> None:
    """Leave no empty messages behind: they are no setting."""
    for way in ("scale_up", "scale_down"):
        if not getattr(scaling.autoscaling, way).ListFields():
            scaling.autoscaling.ClearField(way)
    if not scaling.autoscaling.ListFields():
        scaling.ClearField("autoscaling")


def _touched(flags: ScalingFlags, metrics: Iterable[str], split: Split) -> list[str]:
    named = [split(word, "--scale")[0] for word in flags.scale]
    named += [split(word, "--scale-policy")[0] for word in flags.scale_policy]
    return list(dict.fromkeys([*named, *metrics]))


def _metric(text: str) -> autoscaling_pb2.ScalingMetric:
    name, equals, target = text.partition("=")
    source, slash, rest = name.partition("/")
    if not equals or not target or (slash and source not in _SOURCES) or (not slash and name not in ("cpu", "memory")):
        raise click.UsageError(f"--scale-by: {text!r} is not cpu=60%, memory=2Gi, pods/NAME=10 or external/NAME=30.")
    if slash:
        return autoscaling_pb2.ScalingMetric(source=source, name=rest, average_value=target)
    if target.endswith("%") and target[:-1].isdigit():
        return autoscaling_pb2.ScalingMetric(
            source="resource", name=name, average_utilization_percent=int(target.removesuffix("%"))
        )
    return autoscaling_pb2.ScalingMetric(source="resource", name=name, average_value=target)
