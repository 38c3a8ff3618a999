"""What a deployment should be, from a file and from flags."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from ekiben.cli import autoscaling, delivery, exposures, pods, short
from ekiben.cli.options import CHANGE, DEFAULT, OrDefault, change, taken_away
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import InvalidArgument
from ekiben.registry.v1 import registry_pb2

F = TypeVar("F", bound=Callable[..., Any])

WRITABLE = ("labels", "template", "scaling", "capture", "access_authorization", "exposure")
"""The fields of a deployment that a file and flags say; the others are the server's."""


@dataclass(frozen=True)
class Flags:
    """The flags of create and update, as click gives them; None and empty mean not given."""

    envs: tuple[tuple[str, str | None], ...] = ()
    unset_envs: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    instance_types: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str | None], ...] = ()
    labels: tuple[tuple[str, str | None], ...] = ()
    strategy: str | None = None
    capture: bool | None = None
    capture_percent: float | str | None = None
    capture_body_bytes: int | str | None = None
    redact: tuple[str, ...] = ()
    access_authorization: bool | None = None
    image: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    model_delivery: str | None = None
    exposure: exposures.ExposureFlags = exposures.NONE_GIVEN
    scaling: autoscaling.ScalingFlags = autoscaling.NONE_GIVEN
    pod: pods.PodFlags = pods.NONE_GIVEN

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> "Flags":
        """Take the flags out of a command's arguments."""
        arguments["exposure"] = exposures.ExposureFlags.take(arguments)
        arguments["scaling"] = autoscaling.ScalingFlags.take(arguments)
        arguments["pod"] = pods.PodFlags.take(arguments)
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})


def flag_options(function: F) -> F:
    """The flags that say what a deployment should be."""
    options = [
        click.option(
            "-e", "--env", "envs", type=CHANGE, multiple=True, metavar="KEY=VALUE|KEY-", help="Environment variable."
        ),
        click.option("-s", "--secret", "secrets", multiple=True, metavar="SECRET|SECRET-", help="Secret that it gets."),
        click.option("--replicas", multiple=True, metavar="[SERVICE=]N|default", help="How many replicas."),
        click.option(
            "--instance-type", "instance_types", multiple=True, metavar="[SERVICE=]TYPE", help="Size; '' for none."
        ),
        click.option(
            "--config-override",
            "overrides",
            type=CHANGE,
            multiple=True,
            metavar="SERVICE.KEY=VALUE|SERVICE.KEY-",
            help="BentoML service configuration, as in Summarizer.traffic.timeout=30.",
        ),
        click.option("-l", "--label", "labels", type=CHANGE, multiple=True, metavar="KEY=VALUE|KEY-", help="Label."),
        click.option(
            "--strategy",
            type=click.Choice(
                ["RollingUpdate", "Recreate", "RampedSlowRollout", "BestEffortControlledRollout", DEFAULT]
            ),
            help="How a new revision takes over.",
        ),
        click.option("--capture/--no-capture", default=None, help="Whether predictions are captured."),
        click.option(
            "--capture-percent",
            type=OrDefault(click.FloatRange(0, 100)),
            metavar="PERCENT|default",
            help="Share of predictions that is captured.",
        ),
        click.option(
            "--capture-body-bytes",
            type=OrDefault(click.IntRange(0)),
            metavar="BYTES|default",
            help="How much of each body is kept.",
        ),
        click.option("--redact", multiple=True, metavar="HEADER|HEADER-", help="Header whose value is not captured."),
        click.option(
            "--access-authorization/--no-access-authorization",
            default=None,
            help="Whether a request must carry an API token.",
        ),
        *delivery.OPTIONS,
    ]
    for option in reversed(options):
        function = option(function)
    return exposures.exposure_options(autoscaling.scaling_options(pods.pod_options(function)))


@dataclass(frozen=True)
class Services:
    """The services of a bento, as its manifest names them."""

    entry: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, bento: registry_pb2.Bento) -> "Services":
        """Read a bento's manifest; bentos of BentoML before 1.2 have one service, called as their repository."""
        manifest = json.loads(bento.manifest or "{}")
        entry = str(manifest.get("entry_service") or bento.name.split("/")[1])
        named = [str(service.get("name")) for service in manifest.get("services") or []]
        return cls(entry, tuple(dict.fromkeys([entry, *named])))

    def split(self, word: str, option: str) -> tuple[str, str]:
        """`(service, value)` of `[SERVICE=]VALUE`; the entry service when none is named."""
        name, equals, value = word.partition("=")
        return (self.check(name, option), value) if equals else (self.entry, word)

    def check(self, name: str, option: str) -> str:
        """The name.

        Raises:
            click.UsageError: the bento has no such service.
        """
        if name not in self.names:
            raise click.UsageError(f"{option}: the bento has no service {name!r}; it has {', '.join(self.names)}.")
        return name


def read_file(path: Path) -> pb.Deployment:
    """A deployment from a YAML or JSON file: what `ekiben deployments get NAME -o yaml` prints.

    Short names work in it, and `bento:` may stand at the top instead of below `template:`.

    Raises:
        InvalidArgument: not such a file (FILE_INVALID).
    """
    import yaml

    try:
        data = pods.with_amounts(yaml.safe_load(path.read_text(encoding="utf-8")))
        if not isinstance(data, dict):
            raise ValueError("it is not a mapping")
        if "bento" in data:
            data.setdefault("template", {})["bento"] = data.pop("bento")
        if data.get("name"):
            data["name"] = short.resource("deployments", str(data["name"]))
        deployment = json_format.ParseDict(data, pb.Deployment())
    except (ValueError, AttributeError, yaml.YAMLError, json_format.ParseError) as error:
        raise InvalidArgument(f"{path}: {error}", reason="FILE_INVALID", path=str(path)) from error
    parts: list[pb.Template | pb.CanaryVersion] = [deployment.template, *deployment.template.canary.versions.values()]
    for part in parts:
        if part.bento:
            part.bento = short.bento(part.bento)
        part.secrets[:] = [short.resource("secrets", secret) for secret in part.secrets]
    wanted = pb.Deployment(name=deployment.name, cluster=deployment.cluster, dev=deployment.dev)
    for field in WRITABLE:
        copy_field(field, deployment, wanted)
    return wanted


def copy_field(field: str, source: pb.Deployment, target: pb.Deployment) -> None:
    """Make one writable field of a deployment what it is in another."""
    if field == "access_authorization":
        target.access_authorization = source.access_authorization
        return
    whole: Any = source
    target.ClearField(field)  # type: ignore[arg-type]
    if field in ("labels", "scaling") or whole.HasField(field):
        getattr(target, field).MergeFrom(getattr(whole, field))


def apply(deployment: pb.Deployment, flags: Flags, services: Services) -> list[str]:
    """Change a deployment as the flags say; returns the paths of the update mask that they touch."""
    before = pb.Deployment()
    before.CopyFrom(deployment)
    template = deployment.template
    _set_envs(template, dict(flags.envs), flags.unset_envs)
    for secret in flags.secrets:
        gone = taken_away(secret)
        name = short.resource("secrets", gone or secret)
        if gone:
            template.secrets[:] = [each for each in template.secrets if each != name]
        elif name not in template.secrets:
            template.secrets.append(name)
    for word in flags.instance_types:
        service, kind = services.split(word, "--instance-type")
        template.services[service].instance_type = kind
    if flags.strategy:
        for service in services.names:
            template.services[service].deployment_strategy = "" if flags.strategy == DEFAULT else flags.strategy
    _set_overrides(template, flags.overrides, services)
    delivery.apply(template, flags.image, flags.image_pull_secrets, flags.model_delivery)
    for word in flags.replicas:
        service, count = services.split(word, "--replicas")
        scaling = deployment.scaling[service]
        if count == DEFAULT:
            scaling.ClearField("min_replicas")
            scaling.ClearField("max_replicas")
            continue
        if not count.isdigit():
            raise click.UsageError(f"--replicas: {count!r} is neither a number nor {DEFAULT}.")
        scaling.min_replicas = int(count)
        scaling.max_replicas = max(int(count), 1)
    change(deployment.labels, flags.labels)
    _set_capture(deployment.capture, flags)
    if deployment.capture == pb.CapturePolicy() and (
        deployment.capture != before.capture or not before.HasField("capture")
    ):
        deployment.ClearField("capture")
    autoscaling.apply(deployment, flags.scaling, services.split, services.entry)
    pods.apply(template, flags.pod, services.entry, services.names)
    if flags.exposure.expose == DEFAULT:
        deployment.ClearField("exposure")
    elif flags.exposure != exposures.NONE_GIVEN:
        exposures.apply(deployment.exposure, flags.exposure)
    if flags.access_authorization is not None:
        deployment.access_authorization = flags.access_authorization
    _tidy(before, deployment)
    return changed_paths(before, deployment)


def _tidy(before: pb.Deployment, after: pb.Deployment) -> None:
    """Leave no empty messages behind that were not there: they would be another template, and another revision."""
    for name in list(after.template.services):
        service = after.template.services[name]
        if service == before.template.services.get(name):
            continue
        if not service.pod.resources.ListFields():
            service.pod.ClearField("resources")
        if not service.pod.ListFields():
            service.ClearField("pod")
        if not service.config_overrides.fields:
            service.ClearField("config_overrides")
        if not service.ListFields():
            del after.template.services[name]
    for name in list(after.scaling):
        scaling = after.scaling[name]
        if scaling == before.scaling.get(name):
            continue
        autoscaling.tidy(scaling)
        if not scaling.ListFields():
            del after.scaling[name]


def changed_paths(before: pb.Deployment, after: pb.Deployment) -> list[str]:
    """The paths of the update mask in which two deployments differ."""
    return [path for path in WRITABLE if getattr(before, path) != getattr(after, path)]


def _set_envs(template: pb.Template, envs: Mapping[str, str | None], unset: Sequence[str]) -> None:
    kept = [env for env in template.envs if env.name not in envs and env.name not in unset]
    added = [pb.EnvVar(name=name, value=value) for name, value in envs.items() if value is not None]
    del template.envs[:]
    template.envs.extend([*kept, *added])


def _set_overrides(template: pb.Template, overrides: Sequence[tuple[str, str | None]], services: Services) -> None:
    import yaml

    for path, text in overrides:
        service, dot, rest = path.partition(".")
        if not dot or not rest:
            written = f"{path}-" if text is None else f"{path}={text}"
            raise click.UsageError(f"--config-override: write SERVICE.KEY=VALUE or SERVICE.KEY-, not {written}.")
        struct: Struct = template.services[services.check(service, "--config-override")].config_overrides
        data = json_format.MessageToDict(struct)
        inner = data
        *above, key = rest.split(".")
        outer = []
        for step in above:
            outer.append((inner, step))
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise click.UsageError(f"--config-override: {path} is below something that is not a mapping.")
        if text is not None:
            inner[key] = yaml.safe_load(text)
        else:
            inner.pop(key, None)
            for mapping, step in reversed(outer):
                if not mapping[step]:
                    del mapping[step]
        struct.Clear()
        struct.update(data)


def _set_capture(capture: pb.CapturePolicy, flags: Flags) -> None:
    if flags.capture is not None:
        capture.disabled = not flags.capture
    if isinstance(flags.capture_percent, str):
        capture.ClearField("sample_percent")
    elif flags.capture_percent is not None:
        capture.sample_percent = flags.capture_percent
    if isinstance(flags.capture_body_bytes, str):
        capture.ClearField("max_body_bytes")
    elif flags.capture_body_bytes is not None:
        capture.max_body_bytes = flags.capture_body_bytes
    for word in flags.redact:
        gone = taken_away(word)
        header = (gone or word).lower()
        if gone is not None:
            capture.redacted_headers[:] = [each for each in capture.redacted_headers if each.lower() != header]
        elif header not in capture.redacted_headers:
            capture.redacted_headers.append(header)
