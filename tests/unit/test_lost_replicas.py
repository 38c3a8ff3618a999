"""What a rollout waits for, beyond the properties that hold for all of them."""

from services.deployer.rollout import Plan, Scale, SetView, complete, next_steps

LOST = SetView("old", 0, 0, 0, 0, 1)
"""A set of which only a pod is left whose node does not say that it ended."""


def test_nobody_waits_for_a_replica_whose_node_is_lost() -> None:
    assert complete(Plan(2), SetView("new", 2, 2, 2), [LOST])
    assert not complete(Plan(2), SetView("new", 2, 2, 2), [SetView("old", 0, 0, 0, 1)])


def test_what_may_not_run_twice_is_not_started_beside_a_replica_that_is_lost() -> None:
    plan = Plan(1, surge=0, recreate=True)
    assert next_steps(plan, SetView("new", 0), [LOST]) == []
    assert next_steps(plan, SetView("new", 0), [SetView("old", 0)]) == [Scale("new", 1)]
