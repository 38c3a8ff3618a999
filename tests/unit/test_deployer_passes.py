"""What a pass of the reconciler costs: what has changed, and not what there is."""

from pathlib import Path
from typing import Any

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import InvalidArgument
from services.deployer import messages
from services.deployer.attention import IN_TURN
from services.deployer.reconciler import PATIENCE_S
from services.deployer.runtimes import Phase
from tests.reconciling import Bench, reconciling

MANY = 60


async def until_settled(bench: Bench) -> None:
    for _ in range(12):
        await bench.turn()
    assert all(one.status.state == "RUNNING" for one in await bench.store.list_deployments())


def scaled(replicas: int) -> dict[str, str]:
    return {"scaling": messages.scaling_json({"Iris": pb.Scaling(min_replicas=replicas)})}


def endpoints(bench: Bench) -> dict[str, int]:
    """How many replicas of each deployment gateways are told of."""
    return {one.deployment: len(one.targets[0].endpoints) for one in bench.reconciler.routes.current().routes}


async def test_one_change_among_many_costs_one_apply_and_a_silent_minute_nothing(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        for number in range(MANY):
            await bench.add(f"d{number}")
        await until_settled(bench)
        await bench.uses.report()
        version = bench.reconciler.routes.current().version
        bench.counted()
        for _ in range(60):
            await bench.turn()
        await bench.uses.report()
        assert not bench.runtime.applied and not bench.lineage.reported
        assert bench.statements["UPDATE"] == bench.statements["INSERT"] == 0
        # The few rows that are read in turn, and the generations of all of them now and then; not each row each second.
        assert bench.statements["SELECT"] <= 60 + 60 / 5 + 1
        assert bench.reconciler.routes.current().version == version

        bench.counted()
        await bench.change("d7", **scaled(2))
        for _ in range(5):
            await bench.turn()
        await bench.uses.report()
        assert len(bench.runtime.applied) == 1
        assert bench.lineage.reported == ["deployments/d7"]
        # The change itself, its status on the way and at the end, and one new version of the routes.
        assert bench.statements["UPDATE"] <= 5
        (route,) = (one for one in bench.reconciler.routes.current().routes if one.deployment == "deployments/d7")
        assert len(route.targets[0].endpoints) == 2
        assert bench.reconciler.routes.current().version == version + 1


async def test_what_nobody_told_of_is_found_in_turn(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        for number in range(2 * IN_TURN):
            await bench.add(f"d{number}")
        await until_settled(bench)
        # Somebody writes past the API, and counts no generation up: as when rows were put back from a copy.
        for one in await bench.store.list_deployments():
            await bench.store.write_build(one.uid, "builds/forged")
        bench.reconciler._revisions._versions.clear()
        for _ in range(3):
            await bench.turn()
        assert all(one.build == "builds/forged" for one in bench.reconciler._desired.rows.values())


async def test_a_replica_that_leaves_is_released_once_no_gateway_has_it(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        await bench.add("d", replicas=2)
        await until_settled(bench)
        await bench.change("d", **scaled(1))
        await bench.clock.advance(1)
        for _ in range(3):  # Nobody acknowledges.
            await bench.reconciler.turn()
            await bench.clock.advance(1)
        (one,) = bench.runtime.sets.values()
        assert one.count(Phase.DRAINING) == 1
        for _ in range(3):
            await bench.turn()
        (one,) = bench.runtime.sets.values()
        assert [replica.phase for replica in one.replicas] == [Phase.READY]
        assert not bench.reconciler.routes._excluded


async def test_a_deployment_that_cannot_be_looked_at_keeps_its_way_in_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reconciling(tmp_path) as bench:
        await bench.add("good")
        await bench.add("bad")
        await until_settled(bench)
        apply = bench.runtime.apply

        async def broken(spec: object, replicas: int) -> None:
            if getattr(spec, "deployment", "") == "deployments/bad":
                raise RuntimeError("it does not go")
            await apply(spec, replicas)  # type: ignore[arg-type]

        monkeypatch.setattr(bench.runtime, "apply", broken)
        for name in ("good", "bad"):
            await bench.change(name, **scaled(2))
        for _ in range(4):
            await bench.turn()
        assert endpoints(bench) == {"deployments/good": 2, "deployments/bad": 1}
        monkeypatch.undo()
        for _ in range(4):
            await bench.turn()
        assert endpoints(bench) == {"deployments/good": 2, "deployments/bad": 2}


async def test_a_deployment_that_is_deleted_leaves_nothing_behind(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        await bench.add("d")
        await until_settled(bench)
        await bench.change("d", deleting=True)
        for _ in range(6):
            await bench.turn()
        assert not await bench.store.list_deployments()
        assert not bench.runtime.sets and not bench.reconciler.routes.current().routes
        reconciler = bench.reconciler
        revisions, traffic = reconciler._revisions, reconciler._traffic
        for known in (revisions._known, revisions._versions, reconciler._observed.sets, traffic._routes):
            assert not known
        assert not reconciler._builds._progress and not reconciler._attention.due() and not reconciler.routes._excluded


async def test_a_runtime_that_takes_over_is_told_of_every_deployment(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        for number in range(3 * IN_TURN):
            await bench.add(f"d{number}")
        await until_settled(bench)
        bench.counted()
        bench.reconciler.ask_anew()
        await bench.turn()
        assert sorted(bench.runtime.applied) == sorted(bench.runtime.sets)


async def test_after_a_takeover_nothing_is_done_or_published_until_it_is_known_what_is_there(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        for number in range(3):
            await bench.add(f"d{number}", replicas=2)
        await until_settled(bench)
        await bench.change("d0", deleting=True)
        version = bench.reconciler.routes.current().version
        there, bench.runtime.sets, bench.runtime.known = bench.runtime.sets, {}, False
        bench.reconciler._owned = False  # As another deployer that takes the cluster finds it.
        bench.counted()
        for _ in range(int(PATIENCE_S) - 2):
            await bench.turn()
        assert not bench.runtime.applied and len(await bench.store.list_deployments()) == 3
        assert not bench.reconciler.routes.current().routes or bench.reconciler.routes.current().version == version
        bench.runtime.sets, bench.runtime.known = there, True
        for _ in range(6):
            await bench.turn()
        assert endpoints(bench) == {"deployments/d1": 2, "deployments/d2": 2}


async def test_a_cluster_that_never_tells_does_not_keep_the_others_from_their_routes(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        far = await bench.add("far", cluster="far")
        bench.runtime.silent = {far.place}
        bench.reconciler._owned = False
        for _ in range(int(PATIENCE_S) + 6):
            await bench.turn()
        assert not bench.reconciler.routes.current().routes  # Perhaps there is much there, and nobody else waits.
        assert (await bench.store.list_deployments())[0].status.state == "DEPLOYING"
        await bench.add("near")
        for _ in range(6):
            await bench.turn()
        assert endpoints(bench)["deployments/near"] == 1


async def test_a_set_is_no_orphan_where_the_database_has_its_row(tmp_path: Path) -> None:
    async with reconciling(tmp_path) as bench:
        await bench.add("d")
        await until_settled(bench)
        known = bench.reconciler._desired._rows.pop("uid-d")  # Another deployer made it just now.
        for _ in range(2):
            await bench.turn()
        (one,) = bench.runtime.sets.values()
        assert one.asked == 1 and bench.reconciler._desired.rows["uid-d"].name == known.name


async def test_what_a_deployment_uses_is_reported_though_it_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reconciling(tmp_path) as bench:

        async def broken(*_: object) -> None:
            raise RuntimeError("it does not go")

        monkeypatch.setattr(bench.runtime, "apply", broken)
        await bench.add("d")
        for _ in range(3):
            await bench.turn()
        await bench.uses.report()
        assert bench.lineage.reported == ["deployments/d"]


async def test_uses_that_cannot_be_reported_of_one_are_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reconciling(tmp_path) as bench:
        for name in ("bad", "good"):
            await bench.add(name)
        report = bench.lineage.ReportUses

        async def refusing(request: Any) -> None:
            if request.owner.name == "deployments/bad":
                raise InvalidArgument("Not like this.", reason="USES_INVALID")
            await report(request)

        monkeypatch.setattr(bench.lineage, "ReportUses", refusing)
        await until_settled(bench)
        await bench.uses.report()
        assert bench.lineage.reported == ["deployments/good"]
        monkeypatch.undo()
        await bench.uses.report()
        assert bench.lineage.reported == ["deployments/good", "deployments/bad"]
