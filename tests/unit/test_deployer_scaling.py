"""Who scales a service, by what, and how many replicas it has during a rollout."""

from typing import Any

import pytest
from google.protobuf import json_format

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import rollout, scaling
from services.deployer.domain import InstanceType
from services.deployer.rollout import Scale, SetView
from services.deployer.runtimes import SetStatus
from services.deployer.runtimes.kubernetes.autoscaling import autoscaler_spec, owners_of_replicas, scaled_of
from services.deployer.runtimes.scaling import Autoscaling, Metric, Rules, Scaled

NAMES = {"qps": "requests_per_second"}
SIZE = InstanceType("cpu.1", 1000, 1 << 30)
HPA = Autoscaling("hpa", 2, 8)


def asked(text: str) -> pb.Scaling:
    return json_format.Parse(text, pb.Scaling())


def of(text: str, size: InstanceType | None = SIZE) -> Autoscaling | None:
    return scaling.autoscaling_of(asked(text), size, NAMES)


def a_set(replicas: int, *, autoscaled: bool = False, key: str = "k") -> SetStatus:
    return SetStatus(key, "deployments/d", "u", 1, "main", "S", replicas, autoscaled=autoscaled)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("{}", "none"),
        ('{"minReplicas": 3}', "none"),
        ('{"minReplicas": 1, "maxReplicas": 3}', "hpa"),
        ('{"minReplicas": 0, "maxReplicas": 1}', "none"),
        ('{"minReplicas": 1, "maxReplicas": 3, "autoscaling": {"policy": "none"}}', "none"),
        ('{"autoscaling": {"policy": "external"}}', "external"),
        ('{"minReplicas": 2, "autoscaling": {"policy": "hpa"}}', "none"),
    ],
)
def test_a_range_is_scaled_unless_somebody_says_otherwise(text: str, policy: str) -> None:
    assert scaling.policy_of(asked(text)) == policy
    found = of(text)
    assert (found.policy if found else "none") == policy


def test_without_a_metric_cpu_counts_and_without_a_size_as_an_amount() -> None:
    text = '{"maxReplicas": 3}'
    sized, sizeless = of(text), of(text, None)
    assert sized is not None and sized.metrics == (Metric("resource", "cpu", utilization_percent=80),)
    assert sizeless is not None and sizeless.metrics == (Metric("resource", "cpu", average_value="800m"),)


def test_the_words_of_the_client_become_metrics_and_rules() -> None:
    found = of(
        '{"maxReplicas": 3, "policy": {"metrics": [{"type": "cpu", "value": 60}, {"type": "memory", "value": "2Gi"},'
        ' {"type": "qps", "value": 10.5}, {"type": "queue_length", "value": "3"}], "scale_up_behavior": "fast",'
        ' "scale_down_behavior": "stable", "scale_down_stabilization_window": 60}}'
    )
    assert found is not None
    assert found.metrics == (
        Metric("resource", "cpu", utilization_percent=60),
        Metric("resource", "memory", average_value="2Gi"),
        Metric("pods", "requests_per_second", average_value="10.5"),
        Metric("pods", "queue_length", average_value="3"),
    )
    assert (found.up, found.down) == (Rules(0), Rules(60))
    disabled = of('{"maxReplicas": 3, "policy": {"scale_down_behavior": "disabled"}}')
    assert disabled is not None and disabled.down == Rules(select="Disabled")


def test_what_is_said_in_full_wins_over_the_words_of_the_client() -> None:
    found = of(
        '{"maxReplicas": 3, "policy": {"metrics": [{"type": "cpu", "value": 60}], "scale_up_behavior": "stable"},'
        ' "autoscaling": {"metrics": [{"source": "external", "name": "queue", "labels": {"q": "a"}, "value": "30"}],'
        ' "scaleDown": {"stabilizationWindow": "10s", "steps": [{"type": "Pods", "value": 2, "period": "15s"}]}}}'
    )
    assert found is not None
    made = autoscaler_spec(found, "ekiben-x")
    assert made["metrics"] == [
        {
            "type": "External",
            "external": {
                "metric": {"name": "queue", "selector": {"matchLabels": {"q": "a"}}},
                "target": {"type": "Value", "value": "30"},
            },
        }
    ]
    assert made["behavior"] == {
        "scaleUp": {"stabilizationWindowSeconds": 300},
        "scaleDown": {
            "stabilizationWindowSeconds": 10,
            "policies": [{"type": "Pods", "value": 2, "periodSeconds": 15}],
        },
    }
    assert (made["minReplicas"], made["maxReplicas"]) == (1, 3)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"autoscaling": {"policy": "keda"}}', "autoscaling.policy"),
        (
            '{"autoscaling": {"metrics": [{"source": "resource", "name": "gpu", "averageValue": "1"}]}}',
            "metrics[0].name",
        ),
        ('{"autoscaling": {"metrics": [{"source": "resource", "name": "cpu"}]}}', "metrics[0]"),
        ('{"autoscaling": {"metrics": [{"source": "pods", "name": "x", "value": "1"}]}}', "metrics[0].value"),
        ('{"autoscaling": {"metrics": [{"source": "pods", "name": "x", "averageValue": "much"}]}}', "average_value"),
        ('{"autoscaling": {"metrics": [{"source": "object", "name": "x", "value": "1"}]}}', "metrics[0].object"),
        ('{"autoscaling": {"scaleUp": {"stabilizationWindow": "4000s"}}}', "scale_up.stabilization_window"),
        ('{"autoscaling": {"scaleUp": {"steps": [{"type": "Pods", "value": 1}]}}}', "scale_up.steps[0].period"),
        ('{"policy": {"metrics": [{"type": "cpu", "value": "lots"}]}}', "policy.metrics[0].value"),
        ('{"policy": {"metrics": {"type": "cpu"}}}', "policy.metrics"),
        ('{"policy": {"scale_up_behavior": "slow"}}', "policy.scale_up_behavior"),
        ('{"policy": {"scale_up_stabilization_window": -1}}', "policy.scale_up_stabilization_window"),
    ],
)
def test_what_no_cluster_takes_is_refused_with_its_field(text: str, field: str) -> None:
    found = scaling.violations("s", asked(text), runtime="kubernetes", scales=True)
    assert [path for path, _ in found if path.endswith(field)], found


def test_a_runtime_that_scales_nothing_refuses_what_asks_for_it_in_full() -> None:
    def refused(text: str) -> Any:
        return scaling.violations("s", asked(text), runtime="process", scales=False)

    assert "process" in refused('{"autoscaling": {"policy": "external"}}')[0][1]
    assert not refused('{"maxReplicas": 3, "policy": {"scale_up_behavior": "odd"}}')
    assert not refused('{"maxReplicas": 3, "autoscaling": {"policy": "none"}}')


@pytest.mark.parametrize(
    ("remembered", "new", "old", "desired"),
    [
        (None, None, [], 2),
        (None, a_set(5, autoscaled=True), [], 5),
        (5, a_set(1, autoscaled=True), [], 1),
        (5, a_set(1), [a_set(6, autoscaled=True)], 6),
        (5, a_set(2), [a_set(4)], 5),
        (50, a_set(2), [a_set(4)], 8),
        (1, a_set(2), [a_set(4)], 2),
        (None, a_set(2), [a_set(6, autoscaled=True), a_set(1)], 6),
    ],
)
def test_a_rollout_keeps_the_replicas_that_the_autoscaler_gave(
    remembered: int | None, new: SetStatus | None, old: list[SetStatus], desired: int
) -> None:
    assert scaling.desired_of(HPA, 2, remembered, new, old) == desired
    assert scaling.desired_of(None, 3, remembered, new, old) == 3


def test_what_somebody_else_scales_is_never_shrunk_but_ended() -> None:
    theirs = Autoscaling("external", 1, 1)
    plan = scaling.plan_of(rollout.plan_of("", 3, called=False), theirs)
    new, old = SetView("new", 3, 3, 1), [SetView("old", 3, 3, 3)]
    steps = scaling.kept(rollout.next_steps(plan, new, old), [a_set(3, autoscaled=True, key="old")], theirs)
    assert plan.surge == 3 and not steps
    new = SetView("new", 3, 3, 3)
    steps = scaling.kept(rollout.next_steps(plan, new, old), [a_set(3, autoscaled=True, key="old")], theirs)
    assert steps == [Scale("old", 0)]


def test_a_scaled_service_is_complete_while_it_grows() -> None:
    plan, growing = rollout.plan_of("", 5, called=False), SetView("new", 5, 5, 2)
    assert scaling.complete(plan, growing, [], 2)
    assert not scaling.complete(plan, growing, [], 3)
    assert not scaling.complete(plan, growing, [], None)
    assert not scaling.complete(plan, growing, [SetView("old", 0, 1)], 2)


def test_an_autoscaler_is_told_in_its_own_words() -> None:
    def says(*conditions: tuple[str, str, str]) -> Scaled:
        listed = [
            {"type": kind, "status": status, "reason": reason, "message": "m"} for kind, status, reason in conditions
        ]
        return scaled_of({"status": {"conditions": listed}})

    assert says() == scaled_of(None) == Scaled(None)
    assert says(("AbleToScale", "True", ""), ("ScalingActive", "True", "ValidMetricFound")).works
    assert says(("AbleToScale", "True", ""), ("ScalingActive", "False", "FailedGetPodsMetric")) == Scaled(
        False, "FailedGetPodsMetric", "m"
    )


def test_owners_of_replicas_are_read_from_the_managed_fields() -> None:
    fields = {"f:spec": {"f:replicas": {}}}
    entries = [
        {"manager": "ekiben", "operation": "Apply", "fieldsV1": {"f:spec": {"f:template": {}}}},
        {"manager": "kube-controller-manager", "subresource": "scale", "fieldsV1": fields},
        {"manager": "ekiben-replicas", "fieldsV1": fields},
    ]
    live = {"metadata": {"managedFields": entries}}
    assert owners_of_replicas(live) == {("kube-controller-manager", "scale"), ("ekiben-replicas", "")}


@pytest.mark.parametrize(
    ("before", "count", "after", "policy"),
    [
        ({"min_replicas": 2, "max_replicas": 2}, 1, {"min_replicas": 1, "max_replicas": 1}, "none"),
        ({"min_replicas": 2, "max_replicas": 2}, 3, {"min_replicas": 3, "max_replicas": 3}, "none"),
        ({"min_replicas": 0, "max_replicas": 1}, 2, {"min_replicas": 2, "max_replicas": 2}, "none"),
        ({}, 2, {"min_replicas": 2}, "none"),
        ({"min_replicas": 1, "max_replicas": 4}, 2, {"min_replicas": 2, "max_replicas": 4}, "hpa"),
        ({"min_replicas": 1, "max_replicas": 4}, 6, {"min_replicas": 6, "max_replicas": 6}, "none"),
    ],
)
def test_a_number_by_hand_makes_no_autoscaler(
    before: dict[str, int], count: int, after: dict[str, int], policy: str
) -> None:
    given = pb.Scaling(**before)
    scaling.scale(given, count)
    assert given == pb.Scaling(**after)
    assert scaling.policy_of(given) == policy
