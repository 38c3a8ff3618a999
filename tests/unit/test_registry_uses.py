"""Claims and reports of uses, as pure functions."""

from datetime import UTC, datetime, timedelta

from services.registry.domain import KnownUse, Use, claimed_uses, reported_uses

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(minutes=10)


def kept(known: list[KnownUse], written: list[KnownUse]) -> list[KnownUse]:
    """What is kept once `written` is."""
    return list(({one.use.key: one for one in known} | {one.use.key: one for one in written}).values())


def live(known: list[KnownUse]) -> set[str]:
    """Resources that are in use."""
    return {one.use.resource for one in known if one.use.live}


def uses(*resources: str, consumer: str = "r1") -> list[Use]:
    """Live uses of one consumer."""
    return [Use(consumer, consumer, resource) for resource in resources]


def test_reporting_the_same_again_writes_nothing() -> None:
    known = kept([], reported_uses([], uses("a", "b"), 1, NOW))
    assert reported_uses(known, uses("a", "b"), 1, LATER) == []
    assert reported_uses(known, uses("a", "b"), 2, LATER) == []


def test_what_a_report_leaves_out_has_ended_and_is_remembered() -> None:
    known = kept([], reported_uses([], uses("a", "b"), 1, NOW))
    known = kept(known, reported_uses(known, uses("b"), 2, LATER))
    assert live(known) == {"b"}
    ended = next(one.use for one in known if one.use.resource == "a")
    assert (ended.create_time, ended.end_time) == (NOW, LATER)
    assert reported_uses(known, uses("b"), 2, LATER + timedelta(hours=1)) == []


def test_a_claim_is_not_ended_by_a_report_of_before() -> None:
    known = kept([], reported_uses([], uses("a"), 1, NOW))
    known = kept(known, claimed_uses(known, uses("b", consumer="r2"), 2, NOW, LATER))
    known = kept(known, reported_uses(known, uses("a"), 1, NOW))
    assert live(known) == {"a", "b"}
    known = kept(known, reported_uses(known, uses("b", consumer="r2"), 2, NOW))
    assert live(known) == {"b"}


def test_a_claim_that_lost_is_ended_by_a_report_of_its_generation_and_one_of_a_crash_by_time() -> None:
    known = kept([], claimed_uses([], uses("b", consumer="r2"), 2, NOW, LATER))
    assert live(kept(known, reported_uses(known, [], 2, NOW))) == set()
    assert live(kept(known, reported_uses(known, [], 1, NOW))) == {"b"}
    assert live(kept(known, reported_uses(known, [], 1, LATER))) == set()
    assert live(kept(known, reported_uses(known, [], 0, NOW, gone=True))) == set()


def test_a_use_that_ended_and_is_claimed_again_is_live_since_the_beginning() -> None:
    known = kept([], reported_uses([], uses("a"), 1, NOW))
    known = kept(known, reported_uses(known, [], 2, LATER))
    known = kept(known, claimed_uses(known, uses("a"), 3, LATER, LATER + timedelta(minutes=10)))
    [one] = known
    assert one.use.live and one.use.end_time is None and one.use.create_time == NOW
