"""A rollout never exceeds its surge, never takes away what is needed, and always ends."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.deployer.rollout import Plan, Scale, SetView, complete, next_steps, plan_of

plans = st.one_of(
    st.builds(Plan, st.integers(1, 6), st.integers(1, 6), st.integers(0, 2)),
    st.builds(Plan, st.integers(1, 6), st.just(0), st.integers(1, 3)),
)


@st.composite
def sets(draw: st.DrawFn, key: str) -> SetView:
    asked = draw(st.integers(0, 6))
    total = draw(st.integers(0, 6))
    return SetView(key, asked, total, draw(st.integers(0, total)), draw(st.integers(0, 2)))


observed = st.tuples(sets("new"), st.lists(st.integers(0, 3), max_size=3)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.tuples(*(sets(f"old{i}") for i, _ in enumerate(pair[1]))))
)


def settle(view: SetView, data: st.DataObject | None, *, may_become_ready: bool = True) -> SetView:
    """What a runtime does in a while: towards `asked`, unready ones leave first, some become ready."""
    if view.total > view.asked:
        ready = min(view.ready, view.asked)
        return replace(view, total=view.asked, ready=ready, draining=view.draining + view.total - view.asked)
    ready = view.ready
    if may_become_ready:
        ready = view.asked if data is None else data.draw(st.integers(view.ready, view.asked))
    return replace(view, total=view.asked, ready=ready, draining=0)


@given(plans, observed)
def test_one_step_never_exceeds_the_surge_nor_takes_what_is_needed(
    plan: Plan, seen: tuple[SetView, tuple[SetView, ...]]
) -> None:
    new, old = seen
    views = {view.key: view for view in (new, *old)}
    before = sum(view.occupied for view in views.values())
    after = dict(views)
    for step in next_steps(plan, new, old):
        after[step.key] = replace(after[step.key], asked=step.replicas)
    grown = sum(max(0, after[key].asked - view.occupied) for key, view in views.items())
    assert grown == 0 or before + grown <= plan.desired + plan.surge
    ready_before = sum(view.surely_ready for view in views.values())
    ready_after = sum(view.surely_ready for view in after.values())
    assert ready_after >= min(ready_before, plan.desired - plan.unavailable)
    assert after["new"].asked <= max(plan.desired, new.asked)


@settings(deadline=None)
@given(plans, observed, st.data())
def test_a_rollout_always_ends(plan: Plan, seen: tuple[SetView, tuple[SetView, ...]], data: st.DataObject) -> None:
    new, old = seen
    for turn in range(200):
        if complete(plan, new, old):
            return
        for step in next_steps(plan, new, old):
            new = replace(new, asked=step.replicas) if step.key == new.key else new
            old = tuple(replace(v, asked=step.replicas) if step.key == v.key else v for v in old)
        lucky = None if turn > 20 else data
        new = settle(new, lucky)
        old = tuple(settle(view, lucky) for view in old)
    raise AssertionError(f"no end: {plan} {new} {old}")


@given(st.integers(1, 6), st.integers(1, 3))
def test_a_revision_that_never_starts_leaves_the_old_one_serving(desired: int, turns: int) -> None:
    plan = plan_of("RollingUpdate", desired, called=False)
    new, old = SetView("new", 0), (SetView("old", desired, desired, desired),)
    for _ in range(turns * 5):
        for step in next_steps(plan, new, old):
            new = replace(new, asked=step.replicas) if step.key == "new" else new
            old = tuple(replace(v, asked=step.replicas) if step.key == v.key else v for v in old)
        new, old = settle(new, None, may_become_ready=False), tuple(settle(v, None) for v in old)
    assert old[0].ready == desired
    assert new.asked == 1


@given(st.integers(1, 4))
def test_recreate_starts_nothing_before_the_old_is_gone(desired: int) -> None:
    plan = plan_of("Recreate", desired, called=False)
    new = SetView("new", 0)
    assert [step.key for step in next_steps(plan, new, (SetView("old", 2, 2, 2),))] == ["old"]
    assert next_steps(plan, new, (SetView("old", 0, 0, 0, draining=1),)) == []
    assert next_steps(plan, new, (SetView("old", 0),))[0].replicas == desired


@given(st.integers(1, 4))
def test_an_update_that_is_taken_back_midway_gives_its_room_to_the_next(desired: int) -> None:
    """Two services, and a rollback while the one behind is there twice: neither the first set, which is called, nor
    the second, which nobody calls yet, may stand in the way for ever."""
    plan = plan_of("", desired, called=True)
    called, failed = SetView("rev1", desired, desired, desired), SetView("rev2", desired, desired, desired)
    assert next_steps(plan, SetView("rev3", 0), (called, failed), held=["rev1"]) == [Scale("rev2", 0)]
    (step,) = next_steps(plan, SetView("rev3", 0), (called, replace(failed, asked=0, total=0, ready=0)), held=["rev1"])
    assert step == Scale("rev3", desired)
    assert next_steps(plan, SetView("rev3", 0), (called, failed), held=["rev1", "rev2"]) == []
