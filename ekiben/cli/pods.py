"""The flags that say where a deployment's pods run on a cluster, and with what."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from google.protobuf import json_format

from ekiben.cli.options import CHANGE, change
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.pods_pb2 import PodSettings, Toleration
from ekiben.errors import InvalidArgument

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class PodFlags:
    """As click gives them; empty means not given."""

    pod_files: tuple[str, ...] = ()
    node_selectors: tuple[tuple[str, str | None], ...] = ()
    tolerations: tuple[str, ...] = ()
    requests: tuple[tuple[str, str | None], ...] = ()
    limits: tuple[tuple[str, str | None], ...] = ()

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> "PodFlags":
        """Take the flags out of a command's arguments."""
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})


NONE_GIVEN = PodFlags()


def pod_options(function: F) -> F:
    """The flags."""
    options = [
        click.option(
            "--pod",
            "pod_files",
            multiple=True,
            metavar="[SERVICE=]FILE",
            help="YAML or JSON with all pod settings of a service on a cluster; the entry service's. '' for none.",
        ),
        click.option(
            "--node-selector",
            "node_selectors",
            type=CHANGE,
            multiple=True,
            metavar="KEY=VALUE|KEY-",
            help="Label that the nodes of all services must have.",
        ),
        click.option(
            "--toleration",
            "tolerations",
            multiple=True,
            metavar="KEY[=VALUE][:EFFECT][-]",
            help="Taint of nodes that keeps no service out.",
        ),
        click.option(
            "--request",
            "requests",
            type=CHANGE,
            multiple=True,
            metavar="RESOURCE=AMOUNT|RESOURCE-",
            help="What is set aside for a replica of the entry service, as cpu=500m.",
        ),
        click.option(
            "--limit",
            "limits",
            type=CHANGE,
            multiple=True,
            metavar="RESOURCE=AMOUNT|RESOURCE-",
            help="What that replica cannot go beyond, as nvidia.com/gpu=1.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def apply(template: pb.Template, flags: PodFlags, entry: str, names: tuple[str, ...]) -> None:
    """Change the pod settings of a template's services as the flags say."""
    for word in flags.pod_files:
        service, equals, file = word.partition("=")
        if equals and service not in names:
            raise click.UsageError(f"--pod: the bento has no service {service!r}; it has {', '.join(names)}.")
        path = file if equals else word
        template.services[service if equals else entry].pod.CopyFrom(read(Path(path)) if path else PodSettings())
    for service in names if flags.node_selectors or flags.tolerations else ():
        pod = template.services[service].pod
        change(pod.node_selector, flags.node_selectors)
        for word in flags.tolerations:
            gone = word.removesuffix("-") if word.endswith("-") else None
            if (one := _toleration(gone or word)) in pod.tolerations and gone:
                pod.tolerations.remove(one)
            elif not gone and one not in pod.tolerations:
                pod.tolerations.append(one)
    if flags.requests or flags.limits:
        resources = template.services[entry].pod.resources
        change(resources.requests, flags.requests)
        change(resources.limits, flags.limits)


def with_amounts(data: Any) -> Any:
    """What YAML gave, with amounts of resources as text: `cpu: 4` is a number to YAML, and Kubernetes takes it too."""
    if isinstance(data, list):
        return [with_amounts(each) for each in data]
    if not isinstance(data, dict):
        return data
    return {
        key: {name: str(one) if type(one) in (int, float) else one for name, one in value.items()}
        if key in ("requests", "limits") and isinstance(value, dict)
        else with_amounts(value)
        for key, value in data.items()
    }


def shown(template: pb.Template) -> str:
    """The pod settings of each service that has some, a line each."""
    return "\n".join(
        f"{name}  {json.dumps(json_format.MessageToDict(service.pod, preserving_proto_field_name=True))}"
        for name, service in sorted(template.services.items())
        if service.HasField("pod")
    )


def _toleration(word: str) -> Toleration:
    taint, _, effect = word.partition(":")
    key, equals, value = taint.partition("=")
    return Toleration(key=key, value=value, operator="Equal" if equals else "Exists", effect=effect)


def read(path: Path) -> PodSettings:
    """Pod settings from a file.

    Raises:
        InvalidArgument: not such a file (FILE_INVALID).
    """
    import yaml

    try:
        data = with_amounts(yaml.safe_load(path.read_text(encoding="utf-8")))
        return json_format.ParseDict(data, PodSettings())
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError, json_format.ParseError) as error:
        raise InvalidArgument(f"{path}: {error}", reason="FILE_INVALID", path=str(path)) from error
