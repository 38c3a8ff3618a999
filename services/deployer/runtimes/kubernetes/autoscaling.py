"""A set's HorizontalPodAutoscaler, and what it says of itself. Pure.

The autoscaler writes the Deployment's `replicas`, so that the deployer must own them no more: see `keeping.py`.

Source: kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale; the API autoscaling/v2.
"""

from collections.abc import Mapping
from typing import Any

from services.deployer.runtimes.kubernetes.names import PREFIX, Object
from services.deployer.runtimes.scaling import Autoscaling, Metric, Rules, Scaled

SCALED_BY = f"{PREFIX}/scaled-by"
"""Annotation of a Deployment whose replicas are somebody else's: `hpa` or `external`."""
CONTROLLER = "kube-controller-manager"
"""Who writes for every HorizontalPodAutoscaler."""


def autoscaler_spec(of: Autoscaling, name: str) -> Object:
    """The spec of the autoscaler of the Deployment with this name."""
    made: Object = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": max(1, of.least),
        "maxReplicas": of.most,
        "metrics": [_metric(one) for one in of.metrics],
    }
    behavior = {"scaleUp": of.up, "scaleDown": of.down}
    if rules := {way: _rules(each) for way, each in behavior.items() if each is not None}:
        made["behavior"] = rules
    return made


def scaled_of(live: Mapping[str, Any] | None) -> Scaled:
    """What came of it, in the cluster's words."""
    conditions = {one["type"]: one for one in ((live or {}).get("status") or {}).get("conditions") or ()}
    for kind in ("AbleToScale", "ScalingActive"):
        if conditions.get(kind, {}).get("status") == "False":
            return Scaled(False, str(conditions[kind].get("reason") or ""), str(conditions[kind].get("message") or ""))
    if "ScalingActive" not in conditions:
        return Scaled(None)
    return Scaled(True)


def targets(live: Object, name: str) -> bool:
    """Whether an autoscaler, anybody's, scales the Deployment with this name."""
    target = (live.get("spec") or {}).get("scaleTargetRef") or {}
    return bool(target.get("kind") == "Deployment" and target.get("name") == name)


def owners_of_replicas(live: Object) -> set[tuple[str, str]]:
    """Field manager and subresource of each owner of `replicas`, by the managed fields."""
    return {
        (str(entry.get("manager") or ""), str(entry.get("subresource") or ""))
        for entry in live["metadata"].get("managedFields") or ()
        if "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})
    }


def _metric(one: Metric) -> Object:
    if one.utilization_percent is not None:
        target: Object = {"type": "Utilization", "averageUtilization": one.utilization_percent}
    elif one.average_value:
        target = {"type": "AverageValue", "averageValue": one.average_value}
    else:
        target = {"type": "Value", "value": one.value}
    if one.source == "resource":
        return {"type": "Resource", "resource": {"name": one.name, "target": target}}
    metric: Object = {"name": one.name}
    if one.labels:
        metric["selector"] = {"matchLabels": dict(one.labels)}
    source: Object = {"metric": metric, "target": target}
    if one.object is not None:
        version, kind, name = one.object
        source["describedObject"] = {"apiVersion": version, "kind": kind, "name": name}
    return {"type": one.source.capitalize(), one.source: source}


def _rules(of: Rules) -> Object:
    made: Object = {}
    if of.window_s is not None:
        made["stabilizationWindowSeconds"] = of.window_s
    if of.select:
        made["selectPolicy"] = of.select
    if of.steps:
        made["policies"] = [{"type": one.type, "value": one.value, "periodSeconds": one.period_s} for one in of.steps]
    return made
