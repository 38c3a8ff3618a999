"""Every statement on builds. One implementation for SQLite and PostgreSQL."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from services.builder.domain import (
    Build,
    Environment,
    Failure,
    Image,
    Lease,
    Output,
    Priority,
    State,
    Step,
    dedup_key,
    turn_of,
)
from services.builder.store.images import put_image
from services.builder.store.tables import builds, environments
from services.kernel.db import AsyncConnection, Database, UtcDateTime, insert_into

_ACTIVE = ("QUEUED", "RUNNING")
_NO_LEASE: dict[str, Any] = {"lease_token": None, "lease_owner": None}
_OVER: dict[str, Any] = {**_NO_LEASE, "active_key": None}
_JOINED = sa.select(
    builds,
    *(environments.c[name].label(f"environment_{name}") for name in ("digest", "python_version", "bentoml_version")),
    *(environments.c[name].label(f"environment_{name}") for name in ("package_count", "size_bytes")),
).select_from(builds.outerjoin(environments, builds.c.environment == environments.c.digest))


class Store:
    """The builder's rows. Each method is one transaction; those that take a lease token change nothing without it."""

    def __init__(self, database: Database, site: str = "") -> None:
        """`site` is the folder of environments: builders on one share builds, those on another only see them."""
        self._database = database
        self.site = site
        self._here = builds.c.site.in_(("", site))

    async def insert(self, build: Build) -> bool:
        """Keep a new build. False where an unforced one with the same dedup key is queued or running."""
        try:
            async with self._database.transaction() as connection:
                await connection.execute(builds.insert().values(**_row(replace(build, site=self.site))))
        except IntegrityError:
            return False
        return True

    async def get(self, organization: str, build: str) -> Build | None:
        """One build, or None."""
        query = _JOINED.where(builds.c.id == build, builds.c.organization == organization)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().first()
        return _build(row) if row is not None else None

    async def list(
        self, organization: str, bento: str, before: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Build]:
        """At most `limit` builds, newest first, from after the position `before`; of one bento unless it is empty."""
        query = _JOINED.where(builds.c.organization == organization)
        if bento:
            query = query.where(builds.c.bento == bento)
        if before is not None:
            query = query.where(
                sa.or_(
                    builds.c.create_time < before[0],
                    sa.and_(builds.c.create_time == before[0], builds.c.id < before[1]),
                )
            )
        query = query.order_by(builds.c.create_time.desc(), builds.c.id.desc()).limit(limit)
        async with self._database.read() as connection:
            return [_build(row) for row in (await connection.execute(query)).mappings()]

    async def reusable(self, organization: str, key: str) -> Sequence[Build]:
        """Builds with this dedup key that are queued, running or succeeded here, newest first; a few at most."""
        query = (
            _JOINED.where(
                builds.c.organization == organization,
                builds.c.dedup_key == key,
                builds.c.state.in_([*_ACTIVE, "SUCCEEDED"]),
                self._here,
            )
            .order_by(builds.c.create_time.desc(), builds.c.id.desc())
            .limit(5)
        )
        async with self._database.read() as connection:
            return [_build(row) for row in (await connection.execute(query)).mappings()]

    async def lease(self, token: str, owner: str, now: datetime) -> Lease | None:
        """Take the build here whose turn it is; None where none waits. `now` is when it starts."""
        waits = sa.and_(builds.c.state == State.QUEUED, self._here)
        async with self._database.transaction() as connection:
            turn = sa.func.coalesce(builds.c.turn_time, builds.c.create_time)
            first = sa.select(builds.c.id).where(waits).order_by(turn, builds.c.id).limit(1)
            if self._database.dialect == "postgresql":
                first = first.with_for_update(skip_locked=True)
            chosen = (await connection.execute(first)).scalar()
            return None if chosen is None else await _take(connection, chosen, waits, token, owner, now)

    async def signs_of_life(self) -> dict[str, tuple[str, int]]:
        """What changes with each renewal, of each build that somebody builds here."""
        query = sa.select(builds.c.id, builds.c.lease_token, builds.c.lease_renewals)
        async with self._database.read() as connection:
            rows = await connection.execute(query.where(builds.c.state == State.RUNNING, self._here))
            return {row.id: (row.lease_token, row.lease_renewals) for row in rows}

    async def take_over(
        self, build: str, silent: tuple[str, int], token: str, owner: str, now: datetime
    ) -> Lease | None:
        """Take a build from whoever showed no sign of life; None where there was one, or another was faster."""
        still = sa.and_(
            builds.c.state == State.RUNNING, builds.c.lease_token == silent[0], builds.c.lease_renewals == silent[1]
        )
        async with self._database.transaction() as connection:
            return await _take(connection, build, still, token, owner, now)

    async def renew(self, build: str, token: str) -> bool:
        """Show a sign of life. False where the lease is lost: cancelled, or taken over."""
        return await self._write(build, token, version=None, lease_renewals=builds.c.lease_renewals + 1)

    async def report(self, build: str, token: str, step: str, progress_percent: int) -> bool:
        """Say how far the build has come. False where the lease is lost."""
        return await self._write(build, token, step=step, progress_percent=progress_percent)

    async def found(self, build: Build, token: str) -> bool:
        """Say that the build is made from other content than was asked for. False where the lease is lost.

        Requests for that content do not wait for it any more; those for this one may, once it succeeded.
        """
        key = dedup_key(build)
        return await self._write(build.id, token, bento_digest=build.bento_digest, dedup_key=key, active_key=None)

    async def give_back(self, build: str, token: str) -> bool:
        """Queue the build again: its worker was told to stop. False where the lease is lost."""
        return await self._write(
            build,
            token,
            state=State.QUEUED,
            step=Step.WAITING,
            progress_percent=0,
            attempts=builds.c.attempts - 1,
            **_NO_LEASE,
        )

    async def raise_priority(self, build: Build, priority: Priority) -> None:
        """Let a build that waits go as early as one of this priority would that was asked for then."""
        async with self._database.transaction() as connection:
            await connection.execute(
                builds.update()
                .where(builds.c.id == build.id, builds.c.state == State.QUEUED, builds.c.priority < priority)
                .values(
                    priority=int(priority),
                    turn_time=turn_of(replace(build, priority=priority)),
                    version=builds.c.version + 1,
                )
            )

    async def succeed(
        self,
        build: str,
        token: str,
        environment: Environment | None,
        cached: bool,
        now: datetime,
        image: Image | None = None,
        *,
        made_from: Build | None = None,
    ) -> bool:
        """End the build with what it made. False where the lease is lost; then nothing is kept.

        `made_from` is the build with the content that its worker found, which may be other than what was asked for.
        """
        found: dict[str, Any] = {}
        if made_from is not None:
            found = {"bento_digest": made_from.bento_digest, "dedup_key": dedup_key(made_from)}
        async with self._database.transaction() as connection:
            if environment is not None:
                await self._put_environment(connection, environment, now)
            changed = await connection.execute(
                _with_lease(build, token).values(
                    state=State.SUCCEEDED,
                    step=Step.DONE,
                    progress_percent=100,
                    environment=environment.digest if environment is not None else None,
                    cached=cached,
                    image=image.id if image is not None else None,
                    end_time=now,
                    version=builds.c.version + 1,
                    **_OVER,
                    **found,
                )
            )
            if changed.rowcount == 1 and image is not None:
                await put_image(connection, self._database.dialect, image)
            return changed.rowcount == 1

    async def fail(self, build: str, token: str, failure: Failure, now: datetime) -> bool:
        """End the build without output. False where the lease is lost."""
        text = json.dumps(
            {"reason": failure.reason, "message": failure.message, "metadata": dict(failure.metadata)},
            ensure_ascii=False,
        )
        return await self._write(build, token, state=State.FAILED, failure=text, end_time=now, **_OVER)

    async def cancel(self, organization: str, build: str, now: datetime) -> bool:
        """End a build that has not ended. Its worker, if any, finds its lease gone."""
        async with self._database.transaction() as connection:
            changed = await connection.execute(
                builds.update()
                .where(builds.c.id == build, builds.c.organization == organization, builds.c.state.in_(_ACTIVE))
                .values(state=State.CANCELLED, end_time=now, version=builds.c.version + 1, **_OVER)
            )
            return changed.rowcount == 1

    async def builds_of_image(self, organization: str, image: str, limit: int) -> Sequence[str]:
        """Ids of the builds that gave an image, the newest ones."""
        query = (
            sa.select(builds.c.id)
            .where(builds.c.organization == organization, builds.c.image == image)
            .order_by(builds.c.create_time.desc())
            .limit(limit)
        )
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def builds_of_environment(self, environment: str) -> Sequence[tuple[str, str]]:
        """Organization and id of each build here that gave an environment, the newest first."""
        query = (
            sa.select(builds.c.organization, builds.c.id)
            .where(builds.c.environment == environment, self._here)
            .order_by(builds.c.create_time.desc())
        )
        async with self._database.read() as connection:
            return [(row.organization, row.id) for row in await connection.execute(query)]

    async def unfinished(self) -> set[str]:
        """Ids of the builds that have not ended, anywhere."""
        query = sa.select(builds.c.id).where(builds.c.state.in_(_ACTIVE))
        async with self._database.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def requeue(self, owner: str) -> int:
        """Queue again what a former life of this owner was building. Gives how many there were."""
        async with self._database.transaction() as connection:
            changed = await connection.execute(
                builds.update()
                .where(builds.c.state == State.RUNNING, builds.c.lease_owner == owner)
                .values(
                    state=State.QUEUED, step=Step.WAITING, progress_percent=0, version=builds.c.version + 1, **_NO_LEASE
                )
            )
            return changed.rowcount

    async def running(self) -> set[str]:
        """Ids of builds that a worker has, anywhere."""
        async with self._database.read() as connection:
            return set((await connection.execute(sa.select(builds.c.id).where(builds.c.state == "RUNNING"))).scalars())

    async def ping(self) -> None:
        """Raises Unavailable while the database does not answer."""
        await self._database.ping()

    async def _put_environment(self, connection: AsyncConnection, environment: Environment, now: datetime) -> None:
        known = sa.select(environments.c.digest).where(environments.c.digest == environment.digest)
        values = {
            "python_version": environment.python_version,
            "bentoml_version": environment.bentoml_version,
            "package_count": environment.package_count,
            "size_bytes": environment.size_bytes,
            "use_time": now,
        }
        if (await connection.execute(known)).first() is None:
            row = {"digest": environment.digest, "create_time": now, **values}
            insert = insert_into(self._database.dialect, environments).values(**row).on_conflict_do_nothing()
            await connection.execute(insert)
        else:
            await connection.execute(
                environments.update().where(environments.c.digest == environment.digest).values(**values)
            )

    async def _write(self, build: str, token: str, **values: Any) -> bool:
        values.setdefault("version", builds.c.version + 1)
        if values["version"] is None:  # a change that no watcher cares about
            del values["version"]
        async with self._database.transaction() as connection:
            return (await connection.execute(_with_lease(build, token).values(**values))).rowcount == 1


async def _take(
    connection: AsyncConnection, build: str, still: Any, token: str, owner: str, now: datetime
) -> Lease | None:
    await connection.execute(
        builds.update()
        .where(builds.c.id == build, still)
        .values(
            state=State.RUNNING,
            start_time=sa.func.coalesce(builds.c.start_time, sa.bindparam("now", now, UtcDateTime)),
            attempts=builds.c.attempts + 1,
            version=builds.c.version + 1,
            lease_token=token,
            lease_owner=owner,
            lease_renewals=0,
        )
    )
    query = _JOINED.where(builds.c.id == build, builds.c.lease_token == token)
    row = (await connection.execute(query)).mappings().first()
    return Lease(_build(row), token) if row is not None else None


def _with_lease(build: str, token: str) -> Any:
    return builds.update().where(builds.c.id == build, builds.c.state == State.RUNNING, builds.c.lease_token == token)


def _row(build: Build) -> dict[str, Any]:
    key = dedup_key(build)
    return {
        "id": build.id,
        "uid": build.uid,
        "organization": build.organization,
        "bento": build.bento,
        "bento_digest": build.bento_digest,
        "dedup_key": key,
        "active_key": None if build.force else f"{build.organization}/{key}/{build.site}",
        "secrets": json.dumps(list(build.secrets)),
        "force": build.force,
        "creator": build.creator,
        "traceparent": build.traceparent,
        "state": str(build.state),
        "step": str(build.step),
        "progress_percent": build.progress_percent,
        "failure": None,
        "environment": None,
        "cached": build.cached,
        "create_time": build.create_time,
        "attempts": build.attempts,
        "version": build.version,
        "site": build.site,
        "output": str(build.output),
        "platforms": json.dumps(list(build.platforms)),
        "base": build.base,
        "image": None,
        "priority": int(build.priority),
        "turn_time": turn_of(build),
    }


def _build(row: Any) -> Build:
    environment = None
    if row["environment_digest"] is not None:
        environment = Environment(
            row["environment_digest"],
            row["environment_python_version"],
            row["environment_bentoml_version"],
            row["environment_package_count"],
            row["environment_size_bytes"],
        )
    return Build(
        id=row["id"],
        uid=row["uid"],
        organization=row["organization"],
        bento=row["bento"],
        bento_digest=row["bento_digest"],
        creator=row["creator"],
        create_time=row["create_time"],
        secrets=tuple(json.loads(row["secrets"])),
        force=row["force"],
        traceparent=row["traceparent"],
        state=State(row["state"]),
        step=row["step"],
        progress_percent=row["progress_percent"],
        failure=Failure(**json.loads(row["failure"])) if row["failure"] else None,
        environment=environment,
        cached=row["cached"],
        start_time=row["start_time"],
        end_time=row["end_time"],
        attempts=row["attempts"],
        version=row["version"],
        site=row["site"],
        output=Output(row["output"]),
        platforms=tuple(json.loads(row["platforms"])),
        base=row["base"],
        image=row["image"] or "",
        priority=Priority(row["priority"]),
    )
