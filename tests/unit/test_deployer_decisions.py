"""What is seen of a deployment to what its replica sets are told."""

from services.deployer import decisions, specs
from services.deployer.decisions import Decision, View
from services.deployer.runtimes import Phase, ReplicaStatus, SetStatus
from tests.deployment_rows import a_bento, a_deployment, a_revision

IRIS = a_deployment(latest_revision=2)


def a_set(revision: int, service: str, ready: int, *, asked: int | None = None) -> SetStatus:
    key = specs.key_of(IRIS.uid, revision, "main", service)
    replicas = tuple(ReplicaStatus(f"{service}-{revision}-{each}", Phase.READY, "") for each in range(ready))
    which = (f"deployments/{IRIS.name}", IRIS.uid, revision, "main", service)
    return SetStatus(key, *which, ready if asked is None else asked, replicas)


def a_view(*sets: SetStatus, called: tuple[str, ...] = ("Scorer",)) -> View:
    """Of an update: only the former revision calls Scorer, unless the latest does too."""
    bentos = {1: a_bento("Scorer"), 2: a_bento(*called)}
    versions = {
        number: specs.versions_of(a_revision(IRIS, number=number, bento=bento)) for number, bento in bentos.items()
    }
    return View(IRIS, versions, sets)


def decided(view: View, service: str, *, unrouted: str = "") -> Decision:
    (main,) = view.latest
    return decisions.decide(view, main, service, None, scales=False, routed=lambda replica: replica != unrouted)


def test_a_service_waits_for_what_it_calls_until_gateways_know_the_way() -> None:
    old = (a_set(1, "Iris", 1), a_set(1, "Scorer", 1))
    assert list(decided(a_view(*old), "Scorer").asked.values()) == [1]
    assert not decided(a_view(*old), "Iris").asked
    there = a_view(*old, a_set(2, "Scorer", 1))
    assert not decided(there, "Iris", unrouted="Scorer-2-0").asked
    assert list(decided(there, "Iris").asked.values()) == [1]


def test_an_old_service_stays_while_one_of_its_revision_may_call_it() -> None:
    new = (a_set(2, "Iris", 1), a_set(2, "Scorer", 1))
    scorer = a_set(1, "Scorer", 1)
    assert not decided(a_view(*new, a_set(1, "Iris", 1, asked=0), scorer), "Scorer").asked
    assert decided(a_view(*new, scorer), "Scorer").asked == {scorer.key: 0}


def test_an_old_replica_stays_until_gateways_know_the_new_one() -> None:
    old, new = a_set(1, "Iris", 1), (a_set(2, "Iris", 1), a_set(2, "Scorer", 1))
    waits = decided(a_view(old, *new), "Iris", unrouted="Iris-2-0")
    assert not waits.asked and not waits.fact.complete
    assert decided(a_view(old, *new), "Iris").asked == {old.key: 0}


def test_a_service_that_the_latest_revision_does_not_have_goes_once_that_is_rolled_out_and_nobody_calls_it() -> None:
    iris, scorer = a_set(1, "Iris", 1), a_set(1, "Scorer", 1)
    assert not decisions.obsolete(a_view(scorer, called=()), complete=False)
    assert not decisions.obsolete(a_view(iris, scorer, called=()), complete=True)
    assert decisions.obsolete(a_view(scorer, called=()), complete=True) == [scorer]
