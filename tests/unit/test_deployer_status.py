"""What a deployment's conditions say, and to whom."""

from dataclasses import replace
from datetime import UTC, datetime

from services.deployer import status
from services.deployer.domain import MAIN, Condition, Status
from services.deployer.runtimes import Phase, ReplicaStatus, SetStatus
from services.deployer.status import Facts, ServiceFact

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CRASHED = ReplicaStatus("iris-1", Phase.CRASHED, "", "It exited with 1.", "ValueError: no weights", 3, 3)


def facts(*replicas: ReplicaStatus, old: int = 0, problem: Condition | None = None) -> Facts:
    new = SetStatus("new", "deployments/iris", "u", 2, MAIN, "Iris", 1, replicas)
    ready = tuple(ReplicaStatus(f"old-{i}", Phase.READY) for i in range(old))
    former = (SetStatus("old", "deployments/iris", "u", 1, MAIN, "Iris", old, ready),) if old else ()
    service = ServiceFact(MAIN, "Iris", 1, True, complete=False, new=new, old=former)
    return Facts(2, 2, (service,), problem=problem, serving_revision=1 if old else 0)


def messages(of: Facts) -> dict[str, str]:
    return {c.type: c.message for c in status.summarize(of, Status("DEPLOYING"), NOW).conditions}


def test_what_a_crashed_replica_printed_is_said_once() -> None:
    said = messages(facts(CRASHED))
    assert sum("no weights" in message for message in said.values()) == 1
    assert said["Available"].endswith("It was started 4 times. Its last lines:\nValueError: no weights")
    assert "does not start; it is tried again" in said["Progressing"]


def test_crash_of_the_new_revision_is_told_where_the_old_one_still_serves() -> None:
    said = messages(facts(CRASHED, old=1))
    assert "no weights" not in said["Available"]
    assert "no weights" in said["Progressing"]


def test_a_port_that_somebody_else_has_is_a_condition_and_the_state_stays() -> None:
    ready = facts(ReplicaStatus("iris-1", Phase.READY))
    ready = replace(ready, services=(replace(ready.services[0], complete=True),))
    summary = status.summarize(
        replace(ready, refused_port=7501, url_by_name="http://iris.localhost"), Status("RUNNING"), NOW
    )
    assert summary.state == "RUNNING"
    (condition,) = [each for each in summary.conditions if each.type == "Reachable"]
    assert (condition.status, condition.reason) == (False, "PORT_TAKEN")
    assert "7501" in condition.message and "http://iris.localhost" in condition.message
    assert "Reachable" not in messages(ready)


def test_what_cannot_be_built_is_said_once() -> None:
    problem = Condition("Built", False, "BUILD_FAILED", "builds/b1: The requirement tinidb does not exist.")
    for old in (0, 1):
        said = messages(facts(old=old, problem=problem))
        assert [kind for kind, message in said.items() if "tinidb" in message] == ["Built"]


def test_missing_variable_is_said_whoever_serves() -> None:
    problem = Condition("Available", False, "ENV_MISSING", "It requires the environment variables KEY.")
    assert [k for k, m in messages(facts(problem=problem)).items() if "KEY" in m] == ["Available"]
    assert [k for k, m in messages(facts(old=1, problem=problem)).items() if "KEY" in m] == ["Progressing"]


def test_callers_of_a_deployment_are_not_shown_what_its_replicas_print() -> None:
    brief = status.without_lines(messages(facts(CRASHED))["Available"])
    assert brief == "Replica iris-1: It exited with 1. It was started 4 times."


def test_replica_that_runs_but_is_not_ready_says_what_it_answers() -> None:
    starting = ReplicaStatus("iris-1", Phase.STARTING, "", "It runs, but is not ready: it answers /readyz with 404.")
    assert "answers /readyz with 404." in messages(facts(starting))["Available"]
    again = replace(starting, restart_count=1)
    assert "answers /readyz with 404." in messages(facts(again))["Available"]


def test_what_a_cluster_does_not_take_is_a_condition_of_its_own() -> None:
    ready = facts(ReplicaStatus("iris-1", Phase.READY))
    (service,) = ready.services
    assert service.new is not None
    for reason in ("FIELD_OWNED", "KUBERNETES_AWAY"):
        owned = replace(service.new, note="the API says no", reason=reason)
        summary = status.summarize(replace(ready, services=(replace(service, new=owned),)), Status("RUNNING"), NOW)
        told = {each.type: each for each in summary.conditions}
        assert (told["Applied"].status, told["Applied"].reason, told["Applied"].message) == (
            False,
            reason,
            "The API says no",
        )
        assert told["Available"].message == "Ready: Iris 1/1."
    assert "Applied" not in messages(ready)
