"""Of deployer, builder and recorder, and of what they name in the registry."""

import json
from collections.abc import AsyncIterator
from typing import Any

import sqlalchemy as sa

from ekiben import names
from ekiben.errors import InvalidArgument
from services.builder.store import builds
from services.deployer.store import deployments, revisions
from services.kernel.db import AsyncConnection
from services.operations.findings import Finding, Severity
from services.operations.store.checks.registry import live_uses_of_deployments
from services.recorder.store import tables as recorder
from services.registry.domain import ContentState, Kind
from services.registry.store import catalog
from services.registry.store.tables import secrets


async def of_deployer(connection: AsyncConnection, registry: AsyncConnection | None) -> AsyncIterator[Finding]:
    """Deployments without their revision, and those that name what the registry does not have."""
    latest = sa.and_(
        revisions.c.deployment_uid == deployments.c.uid, revisions.c.number == deployments.c.latest_revision
    )
    statement = sa.select(
        deployments.c.name,
        deployments.c.uid,
        deployments.c.organization,
        deployments.c.terminated,
        deployments.c.latest_revision,
        revisions.c.template,
        revisions.c.bentos,
    ).select_from(deployments.outerjoin(revisions, latest))
    rows = (await connection.execute(statement.where(sa.not_(deployments.c.deleting)))).all()
    for row in rows:
        if row.template is None:
            yield Finding(
                "REVISION_MISSING",
                Severity.ERROR,
                "deployer",
                f"deployments/{row.name}",
                f"Its latest revision is {row.latest_revision}, and that does not exist.",
                "Update or delete the deployment, or restore a backup.",
            )
        elif registry is not None:
            async for finding in _named_by(row, registry):
                yield finding
    if registry is not None:
        known = {row.uid for row in rows}
        for use in await live_uses_of_deployments(registry):
            if use.owner_uid not in known:
                yield Finding(
                    "USE_STALE",
                    Severity.WARNING,
                    "registry",
                    use.resource,
                    f"{use.owner} is said to use it, and there is no such deployment.",
                    "It cannot be deleted without --force.",
                )


async def _named_by(row: Any, registry: AsyncConnection) -> AsyncIterator[Finding]:
    organization = row.organization.removeprefix("organizations/")
    severity = Severity.NOTE if row.terminated else Severity.ERROR
    for bento in json.loads(row.bentos).values():
        try:
            named = names.Bento.parse(bento["name"])
        except InvalidArgument:
            continue
        wanted = [(Kind.BENTO, named.repository, named.bento, bento["digest"])]
        for model, digest in bento.get("models") or ():
            parsed = names.Model.parse(model)
            wanted.append((Kind.MODEL, parsed.repository, parsed.model, digest))
        for kind, repository, version, digest in wanted:
            found = await catalog.version(registry, organization, kind, repository, version)
            content = found[1].content if found is not None else None
            if content is None or not content.state.usable:
                yield Finding(
                    "DEPLOYED_VERSION_MISSING",
                    severity,
                    "deployer",
                    f"deployments/{row.name}",
                    f"It runs {kind.version_name(repository, version)}, which the registry does not have.",
                    "Push it again, restore it, or update the deployment: no replica can be started anew elsewhere.",
                )
            elif content.state is ContentState.READY and digest and content.digest != digest:
                yield Finding(
                    "DEPLOYED_VERSION_CHANGED",
                    Severity.WARNING,
                    "deployer",
                    f"deployments/{row.name}",
                    f"{kind.version_name(repository, version)} was pushed again with other content since.",
                    "Replicas run the content of before; update the deployment to take the new.",
                )
    template = json.loads(row.template)
    for secret in template.get("secrets") or ():
        held = sa.select(secrets.c.uid).where(
            secrets.c.organization == organization, secrets.c.secret == secret.removeprefix("secrets/")
        )
        if (await registry.execute(held)).first() is None:
            yield Finding(
                "DEPLOYED_SECRET_MISSING",
                severity,
                "deployer",
                f"deployments/{row.name}",
                f"It is given {secret}, which does not exist.",
                "Create the secret again, or update the deployment without it.",
            )


async def of_builder(connection: AsyncConnection) -> AsyncIterator[Finding]:
    """Builds whose state and result do not fit."""
    wrong = sa.or_(
        sa.and_(builds.c.state == "SUCCEEDED", builds.c.environment.is_(None)),
        sa.and_(builds.c.state == "RUNNING", builds.c.lease_token.is_(None)),
        sa.and_(builds.c.state.in_(("SUCCEEDED", "FAILED", "CANCELLED")), builds.c.active_key.is_not(None)),
    )
    for row in (await connection.execute(sa.select(builds.c.id, builds.c.state).where(wrong))).all():
        yield Finding(
            "BUILD_STATE_WRONG",
            Severity.ERROR,
            "builder",
            f"builds/{row.id}",
            f"It is {row.state}, and has what such a build does not have, or lacks what it needs.",
            "Somebody changed rows by hand. Build with --force; it answers for nothing else.",
        )


async def of_recorder(connection: AsyncConnection, *, deep: bool) -> AsyncIterator[Finding]:
    """Bodies without predictions and the like; `deep`: sums of traces against their spans."""
    pairs: tuple[tuple[sa.Table, sa.Table, tuple[str, ...], str], ...] = (
        (recorder.prediction_bodies, recorder.predictions, ("sequence",), "BODIES_ORPHANED"),
        (recorder.predictions, recorder.prediction_bodies, ("sequence",), "BODIES_MISSING"),
        (recorder.traces, recorder.spans, ("organization", "trace_id"), "TRACES_EMPTY"),
    )
    if deep:
        pairs += ((recorder.spans, recorder.traces, ("organization", "trace_id"), "SPANS_ORPHANED"),)
    for table, other, keys, check in pairs:
        there = sa.exists().where(*(other.c[key] == table.c[key] for key in keys))
        lost = sa.select(sa.func.count()).select_from(table).where(~there)
        if count := (await connection.execute(lost)).scalar_one():
            yield Finding(
                check,
                Severity.WARNING,
                "recorder",
                table.name,
                f"{count:,} rows of {table.name} have none in {other.name}.",
                "They are forgotten when their time comes; predictions and traces around them are right.",
            )
    if deep:
        spans = (
            sa.select(recorder.spans.c.organization, recorder.spans.c.trace_id, sa.func.count().label("count"))
            .group_by(recorder.spans.c.organization, recorder.spans.c.trace_id)
            .subquery()
        )
        same = sa.and_(*(spans.c[key] == recorder.traces.c[key] for key in ("organization", "trace_id")))
        wrong = sa.select(recorder.traces.c.trace_id).select_from(recorder.traces.join(spans, same))
        for trace in (
            await connection.execute(wrong.where(spans.c.count != recorder.traces.c.span_count).limit(1000))
        ).scalars():
            yield Finding(
                "TRACE_SUM_WRONG",
                Severity.WARNING,
                "recorder",
                f"traces/{trace}",
                "It counts other spans than it has.",
                "Only lists show the wrong number.",
            )
