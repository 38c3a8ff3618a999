"""A round of the collector, asked for over gRPC."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import PermissionDenied
from ekiben.identity.v1 import identity_pb2 as ipb
from ekiben.registry.v1 import deletions_pb2 as dpb
from ekiben.registry.v1 import garbage_pb2 as gpb
from ekiben.registry.v1 import registry_pb2 as pb
from services.kernel.clock import SystemClock
from tests.fixtures_registry import Registry, model_archive, run_registry

NAME = "modelRepositories/iris/models/v1"


class Ahead(SystemClock):
    """A clock that can be put forward."""

    ahead = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.ahead


async def test_an_admin_collects_and_reads_afterwards_what_went(tmp_path: Path) -> None:
    clock = Ahead()
    async with run_registry(tmp_path, clock=clock, garbage_grace_s=0.0) as running:
        await collects(running, clock)


async def collects(running: Registry, clock: Ahead) -> None:
    admin = running.admin
    await running.new_model(admin, "iris", "v1")
    await running.push(admin, NAME, model_archive())
    digest = (await admin.models.GetModel(pb.GetModelRequest(name=NAME))).content.digest
    await admin.models.DeleteModel(pb.DeleteModelRequest(name=NAME))
    [deleted] = (await admin.deletions.ListDeletedVersions(dpb.ListDeletedVersionsRequest())).deleted_versions
    assert [item async for item in admin.garbage.CollectGarbage(gpb.CollectGarbageRequest(dry_run=True))] == []
    await admin.deletions.PurgeVersion(dpb.PurgeVersionRequest(name=deleted.name))
    # What was just pushed is kept for a minute, whoever names it.
    assert [item async for item in admin.garbage.CollectGarbage(gpb.CollectGarbageRequest())] == []
    clock.ahead = timedelta(minutes=2)
    for dry_run in (True, False):
        [item] = [item async for item in admin.garbage.CollectGarbage(gpb.CollectGarbageRequest(dry_run=dry_run))]
        assert (item.kind, item.name, item.last_holder) == (gpb.GarbageItem.BLOB, digest, NAME)
        assert item.size_bytes == len(model_archive())
    assert [item async for item in admin.garbage.CollectGarbage(gpb.CollectGarbageRequest())] == []
    listing = ipb.ListAuditEntriesRequest(resource=f"blobs/{digest}")
    [entry] = (await admin.audit.ListAuditEntries(listing)).audit_entries
    assert f"{len(model_archive())} bytes; last held by {NAME} until " in entry.detail
    developer = await running.stubs_of_role("dev", Role.ROLE_DEVELOPER)
    with pytest.raises(PermissionDenied):
        [item async for item in developer.garbage.CollectGarbage(gpb.CollectGarbageRequest(dry_run=True))]
