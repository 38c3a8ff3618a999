"""Models and bentos: registered, read and listed."""

from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.errors import FailedPrecondition, NotFound
from ekiben.registry.v1 import registry_pb2 as registry
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.manifests import HUGE_BYTES, raw_member, size_bytes
from services.gateway.bentocloud.repositories import Kind, Repository, Version, repository_reply
from services.gateway.bentocloud.wire import (
    Reply,
    last,
    member,
    number,
    page,
    read_labels,
    read_time,
    required,
    resource,
    time_of,
    time_or_none,
)

_UPLOAD_STATUS = {
    registry.Content.PENDING: "pending",
    registry.Content.UPLOADING: "uploading",
    registry.Content.READY: "success",
    registry.Content.FAILED: "failed",
    registry.Content.EXTERNAL: "success",
}
_THERE = (registry.Content.READY, registry.Content.EXTERNAL)


async def get(call: Call, kind: Kind) -> Reply:
    """GET …/{version}; an alias, or `latest`, answers with the version that it means."""
    return version_reply(kind, await find(call, kind), strategy=call.api.upload_strategy)


async def find(call: Call, kind: Kind) -> Version:
    """The version that a request's path names, by its id or by an alias."""
    return await kind.get(call, kind.version_name(call.path("repository"), call.path("version")))


async def find_itself(call: Call, kind: Kind) -> Version:
    """The version that a request's path names by its own id: nobody writes to what an alias happens to mean.

    Raises:
        FailedPrecondition: the path has an alias, or `latest` (VERSION_REQUIRED).
    """
    version = await find(call, kind)
    if last(version.name) != call.path("version"):
        named = f"{call.path('repository')}:{call.path('version')}"
        raise FailedPrecondition(
            f"{named!r} means {version.name} now, and may mean another {kind.word} soon. Name the {kind.word} itself.",
            reason="VERSION_REQUIRED",
            name=named,
            version=version.name,
        )
    return version


async def create(call: Call, kind: Kind) -> Reply:
    """POST …/{kind}s: the version without its bytes."""
    text = (await call.request.read()).decode("utf-8", "replace")
    body = await call.body()
    member(body, "manifest", dict, {})
    fields = {
        "description": member(body, "description", str, ""),
        "labels": read_labels(member(body, "labels", list, [])),
        "manifest": raw_member(text, "manifest"),
    }
    if build_at := member(body, "build_at", str, ""):
        fields["build_time"] = read_time(build_at)
    version, parent = required(body, "version"), kind.repository_name(call.path("repository"))
    kind.version_name(call.path("repository"), version)
    created: Version
    if kind.word == "model":
        model = registry.CreateModelRequest(parent=parent, model_id=version, model=registry.Model(**fields))
        created = await call(call.api.models.CreateModel, model)
    else:
        bento = registry.CreateBentoRequest(parent=parent, bento_id=version, bento=registry.Bento(**fields))
        created = await call(call.api.bentos.CreateBento, bento)
    return version_reply(kind, created, strategy=call.api.upload_strategy)


async def update(call: Call, kind: Kind) -> Reply:
    """PATCH …/{version}: description, manifest and labels, of which absent and null ones stay."""
    text = (await call.request.read()).decode("utf-8", "replace")
    body = await call.body()
    name = kind.version_name(call.path("repository"), call.path("version"))
    changed: Version = registry.Model(name=name) if kind.word == "model" else registry.Bento(name=name)
    paths = []
    if (description := member(body, "description", str)) is not None:
        changed.description = description
        paths.append("description")
    if (labels := member(body, "labels", list)) is not None:
        changed.labels.update(read_labels(labels))
        paths.append("labels")
    if member(body, "manifest", dict) is not None:
        changed.manifest = raw_member(text, "manifest")
        paths.append("manifest")
    if not paths:
        return await get(call, kind)
    updated: Version
    if isinstance(changed, registry.Model):
        model = registry.UpdateModelRequest(model=changed, update_mask=FieldMask(paths=paths))
        updated = await call(call.api.models.UpdateModel, model)
    else:
        bento = registry.UpdateBentoRequest(bento=changed, update_mask=FieldMask(paths=paths))
        updated = await call(call.api.bentos.UpdateBento, bento)
    return version_reply(kind, updated, strategy=call.api.upload_strategy)


async def list_of_repository(call: Call, kind: Kind) -> Reply:
    """GET …/{kind}s: newest first, those without content last, for clients take the first one as the latest."""
    query = call.request.rel_url.query
    start, count = number(query, "start", 0), number(query, "count", 0)
    parent = kind.repository_name(call.path("repository"))
    repository = await kind.get_repository(call, parent)
    total = repository.model_count if isinstance(repository, registry.ModelRepository) else repository.bento_count
    words = _filter(call)
    if count == 1 and not start and not words:
        try:
            found = [await kind.get(call, f"{parent}/{kind.word}s/latest")]
        except NotFound:
            found = [version async for version in kind.versions(call, parent, page_size=1)][:1]
    else:
        found = [version async for version in kind.versions(call, parent, words)]
        found.sort(key=lambda version: version.content.state not in _THERE)
        total = len(found)
        found = found[start : start + count if count else None]
    items = [version_reply(kind, version, strategy=call.api.upload_strategy) for version in found]
    return page(items, start=start, total=total)


async def list_all(call: Call, kind: Kind) -> Reply:
    """GET /api/v1/{kind}s: everything, each with its repository."""
    repositories = {repository.name: repository async for repository in kind.repositories(call)}
    items = []
    async for version in kind.versions(call, f"{kind.word}Repositories/-", _filter(call)):
        repository = repositories.get(version.name.rsplit("/", 2)[0])
        if repository is not None:  # else it was made since, or is gone
            items.append(with_repository(kind, version, repository, strategy=call.api.upload_strategy))
    return page(items)


def with_repository(kind: Kind, version: Version, repository: Repository, *, strategy: str) -> Reply:
    """A version together with its repository."""
    return {**version_reply(kind, version, strategy=strategy), "repository": repository_reply(kind, repository)}


def version_reply(
    kind: Kind,
    version: Version,
    *,
    strategy: str = "auto",
    upload_status: str = "",
    upload_url: str = "",
    download_url: str = "",
    upload_id: str = "",
) -> Reply:
    """A model or a bento. URLs and the upload id belong to this one reply and are stored nowhere."""
    content = version.content
    base = resource(
        kind.word,
        last(version.name),
        version.uid,
        created=version.create_time,
        updated=version.update_time,
        labels=version.labels,
    )
    return {
        **base,
        "description": version.description,
        "version": last(version.name),
        "image_build_status": "pending",
        "upload_status": upload_status or _UPLOAD_STATUS.get(content.state, "pending"),
        "upload_finished_reason": content.failure,
        "presigned_upload_url": upload_url,
        "presigned_download_url": download_url,
        "manifest": kind.manifest(version),
        "transmission_strategy": transmission_strategy(version.manifest, strategy),
        "upload_id": upload_id,
        "upload_started_at": time_or_none(content.upload_start_time),
        "upload_finished_at": time_or_none(content.upload_end_time),
        "build_at": time_of(version.build_time if version.HasField("build_time") else version.create_time),
    }


def transmission_strategy(manifest: str, setting: str) -> str | None:
    """What tells the client how to move the bytes: None one PUT, `presigned_url` parts, `proxy` through us."""
    if setting == "auto":
        return "presigned_url" if size_bytes(manifest) >= HUGE_BYTES else None
    return {"presigned": None, "multipart": "presigned_url", "proxy": "proxy"}[setting]


def _filter(call: Call) -> str:
    return " ".join(filter(None, (call.query("q"), call.query("search"))))
