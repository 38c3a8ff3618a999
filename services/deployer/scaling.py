"""Who scales a service, by what, and how many replicas it should have meanwhile. Pure.

What a client says is in two places: `Scaling.autoscaling` in full, and `Scaling.policy` in the words of `bentoml`,
which are fewer. The first wins, field by field.

During a rollout the deployer gives replicas itself, as many as the autoscaler had given last: the revision that goes
keeps its autoscaler until the first of its replicas is taken away, the one that comes gets it once it has all requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf import json_format

from ekiben.deployer.v1 import autoscaling_pb2, deployer_pb2
from services.deployer import rollout
from services.deployer.domain import InstanceType, replicas_of
from services.deployer.quantities import quantity
from services.deployer.rollout import Plan, Scale, SetView
from services.deployer.runtimes import SetStatus
from services.deployer.runtimes.scaling import (
    EXTERNAL,
    HPA,
    NONE,
    POLICIES,
    SOURCES,
    Autoscaling,
    Metric,
    Rules,
    Step,
)

BEHAVIORS = ("disabled", "stable", "fast")
STABLE_S = 300
CPU_PERCENT = 80
CPU_CORES = "800m"
MAX_WINDOW_S = 3600


def bounds_of(scaling: deployer_pb2.Scaling | None) -> tuple[int, int]:
    """The fewest and the most replicas; at least one, as nobody brings a service back from none yet."""
    if scaling is None:
        return 1, 1
    least = replicas_of(scaling.min_replicas if scaling.HasField("min_replicas") else None)
    return least, max(least, scaling.max_replicas if scaling.HasField("max_replicas") else least)


def scale(given: deployer_pb2.Scaling, count: int) -> None:
    """Ask for so many replicas by hand. Where there is room between the bounds this is the lower one; a number that was
    fixed stays fixed, as with a bound left above it a cluster would scale it from then on."""
    least, most = bounds_of(given)
    given.min_replicas = count
    if given.HasField("max_replicas"):
        given.max_replicas = count if least == most else max(most, count)


def policy_of(scaling: deployer_pb2.Scaling | None) -> str:
    """Who scales."""
    least, most = bounds_of(scaling)
    given = scaling.autoscaling.policy if scaling is not None else ""
    if given == EXTERNAL:
        return EXTERNAL
    return HPA if given != NONE and most > least else NONE


def autoscaling_of(
    scaling: deployer_pb2.Scaling | None, size: InstanceType | None, metric_names: Mapping[str, str]
) -> Autoscaling | None:
    """How a service is scaled, None where nobody does.

    Args:
        scaling: what was asked for.
        size: the service's instance type, if it has one: without requests no share of them can be told.
        metric_names: what the cluster calls the metrics that clients call `gpu` and `qps`.
    """
    policy = policy_of(scaling)
    if scaling is None or policy == NONE:
        return None
    least, most = bounds_of(scaling)
    if policy == EXTERNAL:
        return Autoscaling(EXTERNAL, least, most)
    given = scaling.autoscaling
    words: Mapping[str, Any] = json_format.MessageToDict(scaling.policy) if scaling.HasField("policy") else {}
    metrics = tuple(_metric(one) for one in given.metrics) or _client_metrics(words, metric_names)
    return Autoscaling(
        HPA,
        least,
        most,
        metrics or (_default(size),),
        _rules(given.scale_up) if given.HasField("scale_up") else _client_rules(words, "up"),
        _rules(given.scale_down) if given.HasField("scale_down") else _client_rules(words, "down"),
    )


def desired_of(
    autoscaling: Autoscaling | None,
    least: int,
    remembered: int | None,
    new: SetStatus | None,
    old: Sequence[SetStatus],
) -> int:
    """How many replicas a service should have now.

    Args:
        autoscaling: who scales it, if anybody does.
        least: how many it has where nobody does.
        remembered: what this said the last time.
        new: the set of the latest revision.
        old: those of former revisions.
    """
    if autoscaling is None:
        return least
    if new is not None and new.autoscaled:
        return max(1, new.asked)  # Whoever scales it keeps to the bounds, and is never written over.
    scaled = [one.asked for one in old if one.autoscaled and one.asked]
    value = max(scaled) if scaled else (remembered or least)
    return min(max(value, autoscaling.least), autoscaling.most)


def plan_of(plan: Plan, autoscaling: Autoscaling | None) -> Plan:
    """The plan of a rollout. What somebody else scales is not taken away bit by bit, so the new is there beside it."""
    if autoscaling is None or autoscaling.policy != EXTERNAL or plan.recreate:
        return plan
    return replace(plan, surge=max(1, plan.desired), unavailable=0)


def kept(steps: Sequence[Scale], old: Sequence[SetStatus], autoscaling: Autoscaling | None) -> list[Scale]:
    """Those of the steps that may be made: what somebody else scales is ended as a whole, or left to him."""
    if autoscaling is None or autoscaling.policy != EXTERNAL:
        return list(steps)
    theirs = {one.key for one in old if one.autoscaled}
    return [step for step in steps if step.replicas == 0 or step.key not in theirs]


def complete(plan: Plan, new: SetView, old: Sequence[SetView], least: int | None) -> bool:
    """Whether a service is as desired. `least` where the new set is scaled: it is so with that many, whatever more is
    on its way."""
    if least is not None:
        return new.ready >= min(least, max(1, new.asked)) and all(view.gone for view in old)
    return rollout.complete(plan, new, old)


def violations(path: str, scaling: deployer_pb2.Scaling, *, runtime: str, scales: bool) -> list[tuple[str, str]]:
    """What is wrong with it. `scales` is whether the runtime can."""
    given, found = scaling.autoscaling, []
    here = f"{path}.autoscaling"
    if given.policy and given.policy not in POLICIES:
        found.append((f"{here}.policy", f"must be one of {', '.join(POLICIES)}"))
    asks = given.policy in (HPA, EXTERNAL) or bool(given.metrics)
    asks = asks or given.HasField("scale_up") or given.HasField("scale_down")
    if asks and not scales:
        found.append((here, f"the runtime {runtime} scales nothing by itself: use the policy none, or Kubernetes"))
    for index, metric in enumerate(given.metrics):
        found += _metric_violations(f"{here}.metrics[{index}]", metric)
    for name in ("scale_up", "scale_down"):
        found += _rules_violations(f"{here}.{name}", getattr(given, name))
    if scales and scaling.HasField("policy"):
        found += _client_violations(f"{path}.policy", json_format.MessageToDict(scaling.policy))
    return found


# In full


def _metric(one: autoscaling_pb2.ScalingMetric) -> Metric:
    percent = one.average_utilization_percent if one.HasField("average_utilization_percent") else None
    target = (one.object.api_version, one.object.kind, one.object.name) if one.HasField("object") else None
    return Metric(one.source, one.name, dict(one.labels), target, percent, one.average_value, one.value)


def _rules(given: autoscaling_pb2.ScalingRules) -> Rules:
    window = given.stabilization_window.seconds if given.HasField("stabilization_window") else None
    return Rules(
        window,
        given.select_policy,
        tuple(Step(step.type, step.value, int(step.period.seconds)) for step in given.steps),
    )


def _metric_violations(path: str, one: autoscaling_pb2.ScalingMetric) -> list[tuple[str, str]]:
    found = []
    if one.source not in SOURCES:
        return [(f"{path}.source", f"must be one of {', '.join(SOURCES)}")]
    if not one.name or (one.source == "resource" and one.name not in ("cpu", "memory")):
        found.append((f"{path}.name", "must be cpu or memory" if one.source == "resource" else "is required"))
    percent = one.HasField("average_utilization_percent")
    if [percent, bool(one.average_value), bool(one.value)].count(True) != 1:
        found.append((path, "give one of average_utilization_percent, average_value and value"))
    elif percent and (one.source != "resource" or not 1 <= one.average_utilization_percent <= 1000):
        found.append((f"{path}.average_utilization_percent", "is for the source resource, from 1 to 1000"))
    elif one.value and one.source not in ("object", "external"):
        found.append((f"{path}.value", "is for the sources object and external; use average_value"))
    for name in ("average_value", "value"):
        text = getattr(one, name)
        if text and not _is_quantity(text):
            found.append((f"{path}.{name}", f"{text!r} is no quantity such as 500m or 2Gi"))
    if one.source == "resource" and one.labels:
        found.append((f"{path}.labels", "a resource has none"))
    whole = one.object.api_version and one.object.kind and one.object.name
    if (one.source == "object") != bool(whole):
        found.append((f"{path}.object", "is for the source object alone, and needs api_version, kind and name"))
    return found


def _rules_violations(path: str, given: autoscaling_pb2.ScalingRules) -> list[tuple[str, str]]:
    found = []
    if not 0 <= given.stabilization_window.seconds <= MAX_WINDOW_S:
        found.append((f"{path}.stabilization_window", "must be from 0 to an hour"))
    if given.select_policy not in ("", "Max", "Min", "Disabled"):
        found.append((f"{path}.select_policy", "must be Max, Min or Disabled"))
    for index, step in enumerate(given.steps):
        here = f"{path}.steps[{index}]"
        if step.type not in ("Pods", "Percent"):
            found.append((f"{here}.type", "must be Pods or Percent"))
        if step.value < 1:
            found.append((f"{here}.value", "must be more than 0"))
        if not 1 <= step.period.seconds <= 1800:
            found.append((f"{here}.period", "must be from a second to half an hour"))
    return found


# In the words of the client


def _default(size: InstanceType | None) -> Metric:
    if size is not None and size.cpu_millicores:
        return Metric("resource", "cpu", utilization_percent=CPU_PERCENT)
    return Metric("resource", "cpu", average_value=CPU_CORES)


def _client_metrics(words: Mapping[str, Any], names: Mapping[str, str]) -> tuple[Metric, ...]:
    return tuple(_client_metric(one["type"], one["value"], names) for one in words.get("metrics") or ())


def _client_metric(kind: str, value: Any, names: Mapping[str, str]) -> Metric:
    number = float(value) if isinstance(value, int | float) or str(value).replace(".", "", 1).isdigit() else None
    if kind not in ("cpu", "memory"):
        return Metric("pods", names.get(kind, kind), average_value=f"{number:g}" if number is not None else str(value))
    if number is not None and (kind == "cpu" or number <= 1000):
        return Metric("resource", kind, utilization_percent=max(1, round(number)))
    return Metric("resource", kind, average_value=f"{number:.0f}" if number is not None else str(value))


def _client_rules(words: Mapping[str, Any], way: str) -> Rules | None:
    behavior, window = words.get(f"scale_{way}_behavior"), words.get(f"scale_{way}_stabilization_window")
    if behavior == "disabled":
        return Rules(select="Disabled")
    seconds = {"stable": STABLE_S, "fast": 0}.get(str(behavior or ""))
    if window is not None:
        seconds = int(window)
    return None if seconds is None else Rules(seconds)


def _client_violations(path: str, words: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    metrics = words.get("metrics") or []
    if not isinstance(metrics, list):
        return [(f"{path}.metrics", "must be a list of type and value")]
    for index, one in enumerate(metrics):
        here = f"{path}.metrics[{index}]"
        if not isinstance(one, dict) or not isinstance(one.get("type"), str) or not one["type"]:
            found.append((here, "needs a type: cpu, memory, gpu, qps or the name of a metric of the cluster"))
        elif not isinstance(one.get("value"), int | float | str) or not _is_quantity(_plain(one["value"])):
            found.append((f"{here}.value", "must be a number or a quantity such as 500m or 2Gi"))
    for way in ("up", "down"):
        if (behavior := words.get(f"scale_{way}_behavior")) and behavior not in BEHAVIORS:
            found.append((f"{path}.scale_{way}_behavior", f"must be one of {', '.join(BEHAVIORS)}"))
        window = words.get(f"scale_{way}_stabilization_window")
        if window is not None and not (isinstance(window, int | float) and 0 <= window <= MAX_WINDOW_S):
            found.append((f"{path}.scale_{way}_stabilization_window", "must be from 0 to 3600 seconds"))
    return found


def _is_quantity(text: str) -> bool:
    try:
        return quantity(text) > 0
    except ValueError:
        return False


def _plain(value: Any) -> str:
    return f"{value:f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
