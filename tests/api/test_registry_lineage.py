"""Uses: told by services, shown as graphs, and in the way of a delete."""

import json
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from ekiben.registry.v1 import deletions_pb2 as dpb
from ekiben.registry.v1 import lineage_pb2 as lpb
from ekiben.registry.v1 import registry_pb2 as pb
from tests.fixtures_registry import (
    SERVICE_TOKEN,
    Registry,
    Stubs,
    bento_archive,
    model_archive,
    running_registry,  # noqa: F401
)

MODEL, BENTO = "modelRepositories/iris/models/v1", "bentoRepositories/svc/bentos/v1"
OWNER = lpb.UseOwner(organization="organizations/default", name="deployments/demo", uid="d1")


def use(number: int, resource: str, **fields: Any) -> lpb.Use:
    consumer = f"deployments/demo/revisions/{number}"
    return lpb.Use(consumer=consumer, consumer_uid=f"r{number}", resource=resource, **fields)


async def stored(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    await running.push(running.admin, MODEL, model_archive())
    await running.new_bento(running.admin, "svc", "v1", manifest=json.dumps({"models": ["iris:v1"]}))
    await running.push(running.admin, BENTO, bento_archive())


async def graph(stubs: Stubs, name: str, **options: bool) -> lpb.LineageGraph:
    return await stubs.lineage.GetLineage(lpb.GetLineageRequest(name=name, **options))


def shape(found: lpb.LineageGraph) -> tuple[dict[str, int], set[tuple[str, str, bool]]]:
    nodes = {node.name: node.distance for node in found.nodes}
    return nodes, {(one.consumer, one.resource, one.live) for one in found.uses}


async def refused(call: Any, reason: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        await call
    assert caught.value.reason == reason
    return caught.value


async def test_a_model_of_a_bento_is_not_deleted_and_the_error_says_by_what(running: Registry) -> None:
    admin = running.admin
    await stored(running)
    refusal = await refused(admin.models.DeleteModel(pb.DeleteModelRequest(name=MODEL)), "MODEL_IN_USE")
    assert refusal.message == f"Model 'iris:v1' is used by {BENTO}. Delete that first, or set force."
    assert refusal.violations == [(BENTO, "uses it")]
    repository = pb.DeleteModelRepositoryRequest(name="modelRepositories/iris", force=True)
    await refused(admin.models.DeleteModelRepository(repository), "MODEL_IN_USE")
    await admin.bentos.DeleteBento(pb.DeleteBentoRequest(name=BENTO))
    await admin.models.DeleteModelRepository(repository)


async def test_by_force_a_model_is_deleted_and_its_bento_shows_it(running: Registry) -> None:
    admin = running.admin
    await stored(running)
    await admin.models.DeleteModel(pb.DeleteModelRequest(name=MODEL, force=True))
    nodes = {node.name: node.state for node in (await graph(admin, BENTO)).nodes}
    assert nodes == {BENTO: lpb.LineageGraph.Node.PRESENT, MODEL: lpb.LineageGraph.Node.DELETED}
    [deleted] = (await admin.deletions.ListDeletedVersions(dpb.ListDeletedVersionsRequest())).deleted_versions
    await admin.deletions.PurgeVersion(dpb.PurgeVersionRequest(name=deleted.name))
    nodes = {node.name: node.state for node in (await graph(admin, BENTO)).nodes}
    assert nodes[MODEL] == lpb.LineageGraph.Node.MISSING


async def test_a_bento_that_is_restored_uses_its_models_again(running: Registry) -> None:
    admin = running.admin
    await stored(running)
    await admin.bentos.DeleteBentoRepository(pb.DeleteBentoRepositoryRequest(name="bentoRepositories/svc", force=True))
    assert shape(await graph(admin, MODEL, live_only=True)) == ({MODEL: 0}, set())
    assert shape(await graph(admin, MODEL))[1] == {(BENTO, MODEL, False)}
    [deleted] = (await admin.deletions.ListDeletedVersions(dpb.ListDeletedVersionsRequest())).deleted_versions
    await admin.deletions.UndeleteVersion(dpb.UndeleteVersionRequest(name=deleted.name))
    assert shape(await graph(admin, MODEL))[1] == {(BENTO, MODEL, True)}
    await refused(admin.models.DeleteModel(pb.DeleteModelRequest(name=MODEL)), "MODEL_IN_USE")


async def test_another_manifest_uses_other_models(running: Registry) -> None:
    admin = running.admin
    await running.new_bento(admin, "svc", "v1", manifest=json.dumps({"models": ["iris:v1", "rose:v1"]}))
    changed = pb.Bento(name=BENTO, manifest=json.dumps({"models": ["rose:v1", "tulip:v1"]}))
    await admin.bentos.UpdateBento(pb.UpdateBentoRequest(bento=changed))
    live = shape(await graph(admin, BENTO, live_only=True))[0]
    assert set(live) == {BENTO, "modelRepositories/rose/models/v1", "modelRepositories/tulip/models/v1"}


async def test_lineage_goes_both_ways_from_wherever_one_asks(running: Registry) -> None:
    admin, service = running.admin, running.stubs(SERVICE_TOKEN)
    await stored(running)
    uses = [use(1, BENTO), use(1, MODEL), use(1, "builds/b1")]
    await service.lineage.ClaimUses(lpb.ClaimUsesRequest(owner=OWNER, generation=1, uses=uses[:2]))
    for one in uses:
        one.live = True
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER, generation=1, uses=uses))
    build = lpb.UseOwner(organization=OWNER.organization, name="builds/b1", uid="builds/b1")
    made = lpb.Use(consumer="builds/b1", consumer_uid="builds/b1", resource=BENTO, digest="sha256:00")
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=build, uses=[made]))

    revision = "deployments/demo/revisions/1"
    nodes, edges = shape(await graph(admin, MODEL))
    assert nodes == {MODEL: 0, BENTO: 1, revision: 1, "builds/b1": 2}
    assert (BENTO, MODEL, True) in edges and (revision, BENTO, True) in edges
    assert ("builds/b1", BENTO, False) in edges
    nodes, _ = shape(await graph(admin, revision))
    assert nodes == {revision: 0, BENTO: -1, MODEL: -1, "builds/b1": -1}
    nodes, edges = shape(await graph(admin, "deployments/demo"))
    assert nodes == {"deployments/demo": 0, revision: -1, BENTO: -2, MODEL: -2, "builds/b1": -2}
    assert ("deployments/demo", revision, True) in edges
    nodes, _ = shape(await graph(admin, BENTO))
    assert nodes == {BENTO: 0, MODEL: -1, revision: 1, "builds/b1": 1}
    found = await graph(admin, "bentoRepositories/svc/bentos/latest")
    assert found.name == BENTO
    assert found.nodes[0].digest.startswith("sha256:")


async def test_a_claim_keeps_a_bento_until_a_report_leaves_it_out(running: Registry) -> None:
    admin, service = running.admin, running.stubs(SERVICE_TOKEN)
    await stored(running)
    delete = lambda: admin.bentos.DeleteBento(pb.DeleteBentoRequest(name=BENTO))  # noqa: E731
    claim = lpb.ClaimUsesRequest(owner=OWNER, generation=2, uses=[use(2, BENTO)])
    await service.lineage.ClaimUses(claim)
    refusal = await refused(delete(), "BENTO_IN_USE")
    assert "deployments/demo/revisions/2" in refusal.message
    # A report that was on its way when the claim was made knows nothing of it.
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER, generation=1))
    await refused(delete(), "BENTO_IN_USE")
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER, generation=2, uses=[use(2, BENTO, live=True)]))
    await refused(delete(), "BENTO_IN_USE")
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER, generation=3, uses=[use(2, BENTO)]))
    await delete()
    with pytest.raises(NotFound) as caught:
        await service.lineage.ClaimUses(claim)
    assert caught.value.reason == "BENTO_NOT_FOUND"


async def test_the_end_of_an_owner_ends_its_claims(running: Registry) -> None:
    admin, service = running.admin, running.stubs(SERVICE_TOKEN)
    await stored(running)
    await service.lineage.ClaimUses(lpb.ClaimUsesRequest(owner=OWNER, generation=1, uses=[use(1, BENTO)]))
    owners = lpb.ListUseOwnersRequest(prefix="deployments/")
    assert list((await service.lineage.ListUseOwners(owners)).owners) == []
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER, generation=1, uses=[use(1, BENTO, live=True)]))
    assert list((await service.lineage.ListUseOwners(owners)).owners) == [OWNER]
    await service.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER, gone=True))
    assert list((await service.lineage.ListUseOwners(owners)).owners) == []
    await admin.bentos.DeleteBento(pb.DeleteBentoRequest(name=BENTO))


async def test_only_services_tell_uses_and_bad_names_are_refused(running: Registry) -> None:
    admin = running.admin
    viewer = await running.stubs_of_role("eye", Role.ROLE_VIEWER)
    with pytest.raises(PermissionDenied):
        await admin.lineage.ReportUses(lpb.ReportUsesRequest(owner=OWNER))
    for name in ("", "models/v1", "deployments/", "users/ann"):
        with pytest.raises(InvalidArgument):
            await graph(viewer, name)
    for name in (MODEL, BENTO):
        with pytest.raises(NotFound):
            await graph(viewer, name)
    assert [node.name for node in (await graph(viewer, "deployments/demo")).nodes] == ["deployments/demo"]
