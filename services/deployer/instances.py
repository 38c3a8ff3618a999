"""Instance types: sizes of the settings, and richer ones of a file."""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format

from ekiben.deployer.v1.pods_pb2 import PodSettings
from services.deployer.domain import InstanceType, check_metadata
from services.deployer.quantities import quantity
from services.kernel.settings import SettingsError

_OWN = ("name", "description", "group", "price", "gpu_type")


def load(simple: tuple[str, ...], file: Path | None) -> dict[str, InstanceType]:
    """Instance types by name, in their order; one of the file wins over one of the settings with its name.

    Raises:
        SettingsError: they are not as they must be, with all that is wrong.
    """
    found: dict[str, InstanceType] = {}
    faults = []
    for text in simple:
        try:
            one = InstanceType.parse(text)
            found[one.name] = one
        except ValueError as exc:
            faults.append(f"instance_types: {exc}.")
    if file is not None:
        try:
            listed = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as exc:
            raise SettingsError([*faults, f"instance_types_file: {file} cannot be read: {exc}."]) from None
        if not isinstance(listed, list):
            raise SettingsError([*faults, f"instance_types_file: {file} is no list of instance types."])
        for number, item in enumerate(listed, 1):
            try:
                one = parse(item)
                found[one.name] = one
            except ValueError as exc:
                faults.append(f"instance_types_file: entry {number} of {file}: {exc}.")
    if faults:
        raise SettingsError(faults)
    return found


def parse(item: Any) -> InstanceType:
    """One entry of the file: its own keys, besides those of PodSettings. Raises ValueError."""
    if not isinstance(item, Mapping) or not item.get("name"):
        raise ValueError("it has no name")
    settings = {key: value for key, value in item.items() if key not in _OWN}
    resources = settings.get("resources")
    if isinstance(resources, Mapping):
        settings["resources"] = {
            key: {name: str(amount) for name, amount in value.items()} if isinstance(value, Mapping) else value
            for key, value in resources.items()
        }
    try:
        pod = json_format.ParseDict(settings, PodSettings())
    except json_format.ParseError as exc:
        raise ValueError(str(exc)) from None
    if pod.HasField("patch"):
        raise ValueError("a patch belongs to a deployment, not to an instance type")
    if found := check_metadata("pod", labels=pod.labels, annotations=pod.annotations):
        raise ValueError("; ".join(f"{field.removeprefix('pod.')}: {why}" for field, why in found))
    limits, requests = pod.resources.limits, pod.resources.requests
    amounts = {name: quantity(amount) for name, amount in [*requests.items(), *limits.items()]}
    gpus = [
        amounts[name]
        for name in amounts
        if name.rpartition("/")[2].partition(".")[0] in ("gpu", "vgpu") or "/mig-" in name
    ]
    return InstanceType(
        str(item["name"]),
        int(amounts.get("cpu", Decimal(0)) * 1000),
        int(amounts.get("memory", Decimal(0))),
        int(gpus[0]) if gpus else 0,
        str(item.get("gpu_type") or ""),
        description=str(item.get("description") or ""),
        group=str(item.get("group") or ""),
        price=str(item.get("price") or ""),
        pod=pod,
    )
