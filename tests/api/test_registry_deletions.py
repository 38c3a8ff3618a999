"""Deleting and restoring over gRPC."""

from types import SimpleNamespace
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.cli import deletions as commands
from ekiben.deletions import Deletions
from ekiben.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied
from ekiben.registry.v1 import deletions_pb2 as dpb
from ekiben.registry.v1 import registry_pb2 as pb
from tests.fixtures_registry import (
    Registry,
    Stubs,
    model_archive,
    running_registry,  # noqa: F401
)

NAME = "modelRepositories/iris/models/v1"


async def deleted(stubs: Stubs, parent: str = "") -> list[dpb.DeletedVersion]:
    found = await stubs.deletions.ListDeletedVersions(dpb.ListDeletedVersionsRequest(parent=parent))
    return list(found.deleted_versions)


async def delete(stubs: Stubs, name: str = NAME) -> None:
    await stubs.models.DeleteModel(pb.DeleteModelRequest(name=name))


async def restore(stubs: Stubs, name: str) -> dpb.DeletedVersion:
    return await stubs.deletions.UndeleteVersion(dpb.UndeleteVersionRequest(name=name))


async def test_a_deleted_model_comes_back_whole(running: Registry) -> None:
    admin = running.admin
    before = await running.new_model(admin, "iris", "v1", labels={"team": "risk"}, manifest='{"module": "m"}')
    await running.push(admin, NAME, model_archive())
    before = await admin.models.GetModel(pb.GetModelRequest(name=NAME))
    await delete(admin)
    with pytest.raises(NotFound) as caught:
        await admin.models.GetModel(pb.GetModelRequest(name=NAME))
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert not (await admin.models.ListModels(pb.ListModelsRequest(parent="modelRepositories/-"))).models

    [found] = await deleted(admin)
    assert (found.resource, found.digest, found.labels["team"]) == (NAME, before.content.digest, "risk")
    assert found.deleter == "users/admin"
    assert found.expire_time.seconds - found.delete_time.seconds == 7 * 24 * 3600

    await restore(admin, found.name)
    after = await admin.models.GetModel(pb.GetModelRequest(name=NAME))
    assert after.etag != before.etag
    for volatile in ("etag", "update_time"):
        before.ClearField(volatile)
        after.ClearField(volatile)
    assert after == before
    listing = pb.ListModelsRequest(parent="modelRepositories/-", filter="label:team=risk")
    assert [model.name for model in (await admin.models.ListModels(listing)).models] == [NAME]
    assert await deleted(admin) == []
    signed = await admin.uploads.SignDownload(pb.SignDownloadRequest(resource=NAME))
    assert (await running.get(signed.url))[1] == model_archive()


async def test_a_name_is_free_once_its_model_is_deleted_and_whoever_took_it_keeps_it(running: Registry) -> None:
    admin = running.admin
    await running.new_model(admin, "iris", "v1", description="first")
    await delete(admin)
    await running.new_model(admin, "iris", "v1", description="second")
    [first] = await deleted(admin, NAME)
    with pytest.raises(AlreadyExists) as caught:
        await restore(admin, first.name)
    assert caught.value.reason == "MODEL_EXISTS"
    assert "Delete that one first" in caught.value.message
    await delete(admin)
    second, _ = await deleted(admin, "modelRepositories/iris")
    assert second.resource == first.resource and second.name != first.name
    await restore(admin, first.name)
    assert (await admin.models.GetModel(pb.GetModelRequest(name=NAME))).description == "first"


async def test_a_repository_comes_back_with_what_was_in_it(running: Registry) -> None:
    admin = running.admin
    sent = pb.ModelRepository(name="modelRepositories/iris", description="Flowers", labels={"team": "risk"})
    made = await admin.models.CreateModelRepository(pb.CreateModelRepositoryRequest(model_repository=sent))
    for version in ("v1", "v2"):
        await running.new_model(admin, "iris", version)
    await running.new_bento(admin, "iris", "v1")
    await admin.models.DeleteModelRepository(pb.DeleteModelRepositoryRequest(name=sent.name, force=True))
    found = await deleted(admin, "modelRepositories/-")
    assert sorted(one.resource[-2:] for one in found) == ["v1", "v2"]
    assert await deleted(admin, "bentoRepositories/-") == []
    for one in found:
        await restore(admin, one.name)
    back = await admin.models.GetModelRepository(pb.GetModelRepositoryRequest(name=sent.name))
    assert (back.uid, back.description, back.labels["team"]) == (made.uid, "Flowers", "risk")
    assert back.model_count == 2
    words = pb.ListModelRepositoriesRequest(filter="label:team=risk")
    assert len((await admin.models.ListModelRepositories(words)).model_repositories) == 1


async def test_deleted_versions_are_paged_and_limited_to_a_parent(running: Registry) -> None:
    admin = running.admin
    for version in range(5):
        await running.new_model(admin, "iris", f"v{version}")
        await delete(admin, f"modelRepositories/iris/models/v{version}")
    seen, token = [], ""
    while True:
        request = dpb.ListDeletedVersionsRequest(page_size=2, page_token=token)
        page = await admin.deletions.ListDeletedVersions(request)
        seen += [one.resource[-2:] for one in page.deleted_versions]
        if not (token := page.next_page_token):
            break
    assert seen == ["v4", "v3", "v2", "v1", "v0"]
    assert await deleted(admin, "modelRepositories/other") == []
    with pytest.raises(InvalidArgument):
        await deleted(admin, "models/v1")


async def test_what_is_purged_cannot_be_restored_and_only_admins_purge(running: Registry) -> None:
    admin = running.admin
    developer = await running.stubs_of_role("dev", Role.ROLE_DEVELOPER)
    viewer = await running.stubs_of_role("eye", Role.ROLE_VIEWER)
    await running.new_model(admin, "iris", "v1")
    await delete(developer)
    [found] = await deleted(viewer)
    with pytest.raises(PermissionDenied):
        await restore(viewer, found.name)
    with pytest.raises(PermissionDenied):
        await developer.deletions.PurgeVersion(dpb.PurgeVersionRequest(name=found.name))
    await admin.deletions.PurgeVersion(dpb.PurgeVersionRequest(name=found.name))
    for name in (found.name, "deletedVersions/nobody"):
        with pytest.raises(NotFound) as caught:
            await restore(admin, name)
        assert caught.value.reason == "DELETED_VERSION_NOT_FOUND"


async def test_what_the_command_restores_and_purges(running: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    admin = running.admin
    channel = running.channel(running.settings.admin_token_file.read_text().strip())
    client: Any = SimpleNamespace(deletions=Deletions(channel))
    for version in ("v1", "v2", "v1"):  # v1 was deleted twice
        await running.new_model(admin, "iris", version)
        await delete(admin, f"modelRepositories/iris/models/{version}")
    await running.new_model(admin, "iris", "v2", description="newer")
    restored = await commands.restore_all(client, "modelRepositories/iris")
    assert [one.resource for one in restored] == [NAME]
    assert "iris:v2 exists; the deleted one is left." in capsys.readouterr().err
    assert sorted(one.resource[-2:] for one in await deleted(admin)) == ["v1", "v2"]
    await commands.purge(client, "modelRepositories/iris/models/v2", "")
    await commands.print_deleted(client, "modelRepositories/-", 0, "table")
    shown = capsys.readouterr().out
    assert "iris:v1" in shown
    assert "iris:v2" not in shown
    with pytest.raises(NotFound) as caught:
        await commands.restore(client, None, "modelRepositories/iris/models/v2", "")
    assert caught.value.reason == "DELETED_VERSION_NOT_FOUND"
