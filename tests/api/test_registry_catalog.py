"""Repositories, models and bentos, as clients see them."""

import json
from collections.abc import Awaitable

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import (
    Aborted,
    AlreadyExists,
    EkibenError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from ekiben.registry.v1 import registry_pb2 as pb
from tests.fixtures_registry import (
    Registry,
    bento_archive,
    model_archive,
    running_registry,  # noqa: F401
)

MANIFEST = '{"module": "bentoml.sklearn",  "bentoml_version":"1.4.39", "metadata": {"ü": [1.0, 2e5]}, "size_bytes": 12}'


async def refused(call: Awaitable[object], cls: type[EkibenError], reason: str) -> EkibenError:
    with pytest.raises(cls) as caught:
        await call
    assert caught.value.reason == reason
    return caught.value


async def test_a_model_is_kept_as_it_was_sent(running: Registry) -> None:
    created = await running.new_model(
        running.admin, "iris", "v1", manifest=MANIFEST, description="about", labels={"team": "risk"}
    )
    assert created.name == "modelRepositories/iris/models/v1"
    assert created.manifest == MANIFEST
    assert created.module == "bentoml.sklearn"
    assert created.creator == "users/admin"
    assert created.content.state == pb.Content.PENDING
    read = await running.admin.models.GetModel(pb.GetModelRequest(name=created.name))
    assert read == created
    repository = await running.admin.models.GetModelRepository(
        pb.GetModelRepositoryRequest(name="modelRepositories/iris")
    )
    assert repository.model_count == 1
    assert repository.latest_model == ""


async def test_latest_is_the_newest_with_content(running: Registry) -> None:
    await refused(
        running.admin.models.GetModel(pb.GetModelRequest(name="modelRepositories/iris/models/latest")),
        NotFound,
        "MODEL_NOT_FOUND",
    )
    for version in ("v1", "v2", "v3"):
        await running.new_model(running.admin, "iris", version)
    for version in ("v2", "v1"):
        await running.push(running.admin, f"modelRepositories/iris/models/{version}", model_archive())
    latest = await running.admin.models.GetModel(pb.GetModelRequest(name="modelRepositories/iris/models/latest"))
    assert latest.name.endswith("/v2")
    listed = await running.admin.models.ListModelRepositories(pb.ListModelRepositoriesRequest())
    assert listed.model_repositories[0].latest_model == "modelRepositories/iris/models/v2"
    await refused(running.new_model(running.admin, "iris", "latest"), InvalidArgument, "VERSION_RESERVED")


async def test_a_model_of_a_hub_has_no_content_of_its_own(running: Registry) -> None:
    manifest = json.dumps({"module": "", "metadata": {"registry": "huggingface"}})
    model = await running.new_model(running.admin, "llama", "v1", manifest=manifest)
    assert model.content.state == pb.Content.EXTERNAL
    latest = await running.admin.models.GetModel(pb.GetModelRequest(name="modelRepositories/llama/models/latest"))
    assert latest.name == model.name
    await refused(
        running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=model.name)),
        FailedPrecondition,
        "CONTENT_EXTERNAL",
    )


async def test_a_bento_under_development_completes_without_content(running: Registry) -> None:
    for version, manifest, state in (("dev", '{"dev": true}', pb.Content.EXTERNAL), ("real", "{}", None)):
        bento = await running.new_bento(running.admin, "iris", version, manifest=manifest)
        opened = await running.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=bento.name)))
        complete = running.admin.uploads.CompleteUpload(pb.CompleteUploadRequest(name=opened.name))
        if state is None:
            await refused(complete, FailedPrecondition, "UPLOAD_INCOMPLETE")
        else:
            assert (await complete).state == pb.Upload.COMPLETED
            read = await running.admin.bentos.GetBento(pb.GetBentoRequest(name=bento.name))
            assert read.content.state == state


async def test_models_of_a_bento_are_read_from_its_manifest(running: Registry) -> None:
    manifest = json.dumps({"bentoml_version": "1.4.39", "models": ["iris:v1", "bad tag", 7, "iris:v1", "gpt:x"]})
    bento = await running.new_bento(running.admin, "svc", "v1", manifest=manifest)
    assert list(bento.models) == ["modelRepositories/iris/models/v1", "modelRepositories/gpt/models/x"]
    assert bento.bentoml_version == "1.4.39"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"manifest": "{"}, "MANIFEST_INVALID"),
        ({"manifest": "[1]"}, "MANIFEST_INVALID"),
        ({"manifest": "[" * 100_000}, "MANIFEST_INVALID"),
        ({"manifest": '{"a": "' + "x" * (4 << 20) + '"}'}, "MANIFEST_TOO_LARGE"),
        ({"description": "x" * (3 << 20) + "y"}, "DESCRIPTION_INVALID"),
        ({"description": "nul\0"}, "DESCRIPTION_INVALID"),
        ({"labels": {"k" * 129: "v"}}, "LABELS_INVALID"),
        ({"labels": {"": "v"}}, "LABELS_INVALID"),
        ({"labels": {"k": "v" * 1025}}, "LABELS_INVALID"),
        ({"annotations": {"": "v"}}, "ANNOTATIONS_INVALID"),
        ({"annotations": {"k" * 257: "v"}}, "ANNOTATIONS_INVALID"),
        ({"annotations": {"k": "nul\0"}}, "ANNOTATIONS_INVALID"),
        ({"annotations": {str(n): "x" * 2048 for n in range(128)}}, "ANNOTATIONS_INVALID"),
    ],
)
async def test_what_cannot_be_kept_is_refused_and_changes_nothing(
    running: Registry,
    fields: dict[str, object],
    reason: str,
) -> None:
    await refused(running.new_model(running.admin, "iris", "v1", **fields), InvalidArgument, reason)
    listed = await running.admin.models.ListModelRepositories(pb.ListModelRepositoriesRequest())
    assert listed.total_size == 0


async def test_names_follow_bentoml(running: Registry) -> None:
    for repository, version in (
        ("I", "v1"),
        ("a" * 64, "v1"),
        ("iris", "v/1"),
        ("iris", ""),
        ("-", "v1"),
        ("iris", "é"),
    ):
        await refused(running.new_model(running.admin, repository, version), InvalidArgument, "NAME_INVALID")
    await running.new_model(running.admin, "a" * 63, "1.0_b-c")


async def test_an_update_changes_what_its_mask_names(running: Registry) -> None:
    model = await running.new_model(running.admin, "iris", "v1", labels={"a": "1", "b": "2"}, description="old")
    updated = await running.admin.models.UpdateModel(
        pb.UpdateModelRequest(
            model=pb.Model(name=model.name, labels={"b": "3"}, description="new"),
            update_mask=FieldMask(paths=["labels"]),
        )
    )
    assert dict(updated.labels) == {"b": "3"}
    assert updated.description == "old"
    assert updated.etag != model.etag
    stale = pb.UpdateModelRequest(model=pb.Model(name=model.name, description="late", etag=model.etag))
    await refused(running.admin.models.UpdateModel(stale), Aborted, "ETAG_MISMATCH")
    annotated = pb.Model(name=model.name, annotations={"report": "{}"})
    updated = await running.admin.models.UpdateModel(pb.UpdateModelRequest(model=annotated))
    assert (dict(updated.annotations), dict(updated.labels)) == ({"report": "{}"}, {"b": "3"})
    cleared = await running.admin.models.UpdateModel(
        pb.UpdateModelRequest(model=pb.Model(name=model.name), update_mask=FieldMask(paths=["*"]))
    )
    assert (cleared.description, dict(cleared.labels), dict(cleared.annotations)) == ("", {}, {})


async def test_a_repository_with_versions_is_deleted_by_force_only(running: Registry) -> None:
    await running.new_bento(running.admin, "iris", "v1", labels={"a": "b"})
    name = "bentoRepositories/iris"
    delete = running.admin.bentos.DeleteBentoRepository
    await refused(delete(pb.DeleteBentoRepositoryRequest(name=name)), FailedPrecondition, "BENTO_REPOSITORY_NOT_EMPTY")
    await delete(pb.DeleteBentoRepositoryRequest(name=name, force=True))
    await refused(
        running.admin.bentos.GetBento(pb.GetBentoRequest(name=f"{name}/bentos/v1")), NotFound, "BENTO_NOT_FOUND"
    )
    await refused(
        running.admin.bentos.ListBentos(pb.ListBentosRequest(parent=name)), NotFound, "BENTO_REPOSITORY_NOT_FOUND"
    )


async def test_what_exists_is_not_made_again(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1", description="first")
    await refused(running.new_model(running.admin, "iris", "v1"), AlreadyExists, "MODEL_EXISTS")
    again = pb.CreateModelRepositoryRequest(model_repository=pb.ModelRepository(name="modelRepositories/iris"))
    await refused(running.admin.models.CreateModelRepository(again), AlreadyExists, "MODEL_REPOSITORY_EXISTS")


async def test_a_viewer_reads_and_changes_nothing(running: Registry) -> None:
    viewer = await running.stubs_of_role("vera", Role.ROLE_VIEWER)
    model = await running.new_model(running.admin, "iris", "v1")
    assert (await viewer.models.GetModel(pb.GetModelRequest(name=model.name))).name == model.name
    for call in (
        running.new_model(viewer, "iris", "v2"),
        viewer.models.DeleteModel(pb.DeleteModelRequest(name=model.name)),
        viewer.uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=model.name))),
    ):
        await refused(call, PermissionDenied, "ROLE_TOO_LOW")


async def test_lists_end_and_neither_repeat_nor_skip(running: Registry) -> None:
    names = [f"v{number}" for number in range(23)]
    for version in names:
        await running.new_model(running.admin, "iris", version)
    for sort, wanted in (("", names[::-1]), ("sort:created_at-asc", names), ("sort:size-asc", names)):
        found: list[str] = []
        token = ""
        while True:
            page = await running.admin.models.ListModels(
                pb.ListModelsRequest(parent="modelRepositories/-", page_size=5, page_token=token, filter=sort)
            )
            assert page.total_size == 23
            found += [model.name.rpartition("/")[2] for model in page.models]
            token = page.next_page_token
            if not token:
                break
        assert found == wanted


async def test_a_page_ends_early_rather_than_grow_past_a_message(running: Registry) -> None:
    manifest = json.dumps({"big": "x" * 1_500_000})
    for version in ("a", "b", "c"):
        await running.new_bento(running.admin, "big", version, manifest=manifest)
    page = await running.admin.bentos.ListBentos(pb.ListBentosRequest(parent="bentoRepositories/big"))
    assert len(page.bentos) == 1
    assert page.total_size == 3
    assert page.next_page_token


async def test_an_unknown_term_says_what_is_allowed(running: Registry) -> None:
    error = await refused(
        running.admin.models.ListModels(pb.ListModelsRequest(parent="modelRepositories/-", filter="colour:red")),
        InvalidArgument,
        "FILTER_INVALID",
    )
    assert "label:" in error.message


async def test_a_forced_push_leaves_the_former_content_until_it_is_whole(running: Registry) -> None:
    bento = await running.new_bento(running.admin, "iris", "v1")
    await running.push(running.admin, bento.name, bento_archive(b"one"))
    before = await running.admin.bentos.GetBento(pb.GetBentoRequest(name=bento.name))
    opened = await running.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=bento.name)))
    during = await running.admin.bentos.GetBento(pb.GetBentoRequest(name=bento.name))
    assert during.content.state == pb.Content.READY
    assert during.content.digest == before.content.digest
    assert during.content.open_upload == opened.name
    await running.admin.uploads.AbortUpload(pb.AbortUploadRequest(name=opened.name, failure="network"))
    after = await running.admin.bentos.GetBento(pb.GetBentoRequest(name=bento.name))
    assert (after.content.state, after.content.digest) == (pb.Content.READY, before.content.digest)
    assert after.content.open_upload == ""
    await running.push(running.admin, bento.name, bento_archive(b"two"))
    replaced = await running.admin.bentos.GetBento(pb.GetBentoRequest(name=bento.name))
    assert replaced.content.digest != before.content.digest
