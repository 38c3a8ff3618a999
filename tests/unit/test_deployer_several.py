"""Several places as one runtime: each is asked for what is its own, and one that is away hurts no other."""

import asyncio

from services.deployer.runtimes import ReplicaStatus, SetSpec, SetStatus
from services.deployer.runtimes.several import OWN, SeveralRuntimes
from tests.places import Place


def spec(key: str, place: str) -> SetSpec:
    return SetSpec(key, f"deployments/{key}", f"uid-{key}", 1, "main", "S", True, False, "b", "", (), "", place=place)


async def said(runtimes: SeveralRuntimes, uid: str) -> list[str]:
    return [line.replica async for line in runtimes.logs(uid)]


async def test_each_place_has_what_is_its_own() -> None:
    own, there = Place("own"), Place("there")
    runtimes = SeveralRuntimes(own)  # type: ignore[arg-type]
    await runtimes.add("c/one", there)  # type: ignore[arg-type]
    await runtimes.apply(spec("a", OWN), 1)
    await runtimes.apply(spec("b", "c/one"), 2)
    await runtimes.scale("b", 3)
    assert {key: n for key, (_, n) in own.sets.items()} == {"a": 1}
    assert {key: n for key, (_, n) in there.sets.items()} == {"b": 3}
    assert {one.key: one.asked for one in await runtimes.observe()} == {"a": 1, "b": 3}
    assert (await said(runtimes, "uid-a"), await said(runtimes, "uid-b")) == (["own"], ["there"])


async def test_a_place_that_is_not_there_yet_is_asked_later() -> None:
    runtimes = SeveralRuntimes(Place("own"))  # type: ignore[arg-type]
    await runtimes.apply(spec("b", "c/one"), 2)
    await runtimes.apply(spec("gone", "c/one"), 2)
    await runtimes.scale("gone", 0)
    [waiting] = await runtimes.observe()
    assert (waiting.key, waiting.asked, waiting.replicas, waiting.outlives) == ("b", 2, (), True)
    assert "cannot be reached" in waiting.note
    there = Place("there")
    await runtimes.add("c/one", there)  # type: ignore[arg-type]
    assert {key: n for key, (_, n) in there.sets.items()} == {"b": 2}
    assert [one.note for one in await runtimes.observe()] == [""]


async def test_a_place_that_knows_its_sets_itself_is_asked_for_them_after_a_restart() -> None:
    there = Place("there")
    there.sets["old"] = spec("old", "c/one"), 1
    runtimes = SeveralRuntimes(Place("own"))  # type: ignore[arg-type]
    await runtimes.add("c/one", there)  # type: ignore[arg-type]
    await runtimes.observe()
    await runtimes.scale("old", 0)
    assert there.sets["old"][1] == 0
    assert await said(runtimes, "uid-old") == ["there"]


async def test_a_change_anywhere_wakes() -> None:
    own, there = Place("own"), Place("there")
    runtimes = SeveralRuntimes(own)  # type: ignore[arg-type]
    waiting = asyncio.ensure_future(runtimes.changed())
    await asyncio.sleep(0)
    await runtimes.add("c/one", there)  # type: ignore[arg-type]
    await asyncio.wait_for(waiting, 5)
    await runtimes.observe()
    waiting = asyncio.ensure_future(runtimes.changed())
    await asyncio.sleep(0)
    assert not waiting.done()
    there.moved.set()
    await asyncio.wait_for(waiting, 5)
    runtimes.remove("c/one", there)  # type: ignore[arg-type]
    await asyncio.wait_for(runtimes.changed(), 5)


def test_a_status_is_of_a_runtime_that_ends_with_the_deployer_unless_it_says_so() -> None:
    assert not SetStatus("k", "", "", 1, "main", "S", 0, (ReplicaStatus("r", None),)).outlives  # type: ignore[arg-type]


async def test_a_place_is_known_once_it_is_there_and_has_told() -> None:
    own, there = Place("own"), Place("there")
    there.known = False
    runtimes = SeveralRuntimes(own)  # type: ignore[arg-type]
    assert runtimes.knows(OWN) and not runtimes.knows("c/one")
    await runtimes.add("c/one", there)  # type: ignore[arg-type]
    assert not runtimes.knows("c/one")
    there.known = True
    assert runtimes.knows("c/one")
