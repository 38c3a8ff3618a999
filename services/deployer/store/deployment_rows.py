"""Tables and queries of the deployer."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from ekiben.errors import Aborted
from services.deployer.domain import Bento, Cluster, Condition, Deployment, Revision, Status
from services.kernel.db import AsyncConnection, Database, UtcDateTime, insert_into

metadata = sa.MetaData()

deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("uid", sa.String(36), primary_key=True),
    sa.Column("organization", sa.String(128), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("cluster", sa.String(63), nullable=False),
    sa.Column("scaling", sa.Text, nullable=False),
    sa.Column("capture", sa.Text, nullable=False),
    sa.Column("access_authorization", sa.Boolean, nullable=False),
    sa.Column("dev", sa.Boolean, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("latest_revision", sa.Integer, nullable=False),
    sa.Column("terminated", sa.Boolean, nullable=False),
    sa.Column("deleting", sa.Boolean, nullable=False),
    sa.Column("port", sa.Integer, nullable=True),
    sa.Column("build", sa.String(128), nullable=False),
    sa.Column("traceparent", sa.String(64), nullable=False),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("exposure", sa.Text, nullable=False, server_default=""),
    sa.Column("exposed_host", sa.String(253), nullable=True),
    sa.Column("kubernetes_namespace", sa.String(63), nullable=False, server_default=""),
    sa.UniqueConstraint("organization", "name", name="deployments_name"),
    sa.UniqueConstraint("port", name="deployments_port"),
    sa.Index("deployments_exposed_host", "exposed_host", unique=True),
)
revisions = sa.Table(
    "revisions",
    metadata,
    sa.Column("deployment_uid", sa.String(36), sa.ForeignKey("deployments.uid", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("template", sa.Text, nullable=False),
    sa.Column("bentos", sa.Text, nullable=False),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("rolled_back_to", sa.Integer, nullable=False),
)
route_tables = sa.Table(
    "route_tables",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
)
clusters = sa.Table(
    "clusters",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    # The data directory of the deployer that has it, and a number that this one counts up; empty for nobody.
    sa.Column("owner", sa.String(64), nullable=False, server_default=""),
    sa.Column("owner_signs", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("description", sa.Text, nullable=False, server_default=""),
    sa.Column("server", sa.Text, nullable=False, server_default=""),
    sa.Column("namespaces", sa.Text, nullable=False, server_default="[]"),
    sa.Column("pull_host", sa.Text, nullable=False, server_default=""),
    sa.Column("pull_secret", sa.Text, nullable=False, server_default=""),
    sa.Column("otlp_http_endpoint", sa.Text, nullable=False, server_default=""),
    # Sealed with the key of this id; null for the identity of the deployer's pod.
    sa.Column("key_id", sa.String(64), nullable=False, server_default=""),
    sa.Column("kubeconfig", sa.LargeBinary, nullable=True),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("update_time", UtcDateTime, nullable=True),
)

_AT_ONCE = 500
"""Rows that one statement names."""


class Store:
    """Rows in and out. Reads and single writes are transactions of their own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_deployments(self, organization: str | None = None) -> list[Deployment]:
        """Deployments, newest first; of every organization when none is named."""
        query = sa.select(deployments).order_by(deployments.c.create_time.desc(), deployments.c.name)
        if organization is not None:
            query = query.where(deployments.c.organization == organization)
        async with self._database.read() as connection:
            return [_deployment(row) for row in (await connection.execute(query)).mappings()]

    async def generations(self) -> dict[str, int]:
        """The generation of each deployment, by uid."""
        async with self._database.read() as connection:
            rows = await connection.execute(sa.select(deployments.c.uid, deployments.c.generation))
            return {row.uid: row.generation for row in rows}

    async def deployments_of(self, uids: Collection[str]) -> list[Deployment]:
        """Those of these deployments that there are."""
        wanted, found = sorted(uids), []
        async with self._database.read() as connection:
            for start in range(0, len(wanted), _AT_ONCE):
                query = sa.select(deployments).where(deployments.c.uid.in_(wanted[start : start + _AT_ONCE]))
                found += [_deployment(row) for row in (await connection.execute(query)).mappings()]
        return found

    async def latest_revisions(self) -> list[Revision]:
        """The newest revision of each deployment."""
        newest = sa.and_(
            revisions.c.deployment_uid == deployments.c.uid, revisions.c.number == deployments.c.latest_revision
        )
        query = sa.select(revisions).join(deployments, newest)
        async with self._database.read() as connection:
            return [_revision(row) for row in (await connection.execute(query)).mappings()]

    async def get_deployment(self, organization: str, name: str) -> Deployment | None:
        """One deployment by its id."""
        query = sa.select(deployments).where(deployments.c.organization == organization, deployments.c.name == name)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else _deployment(row)

    async def add_deployment(self, deployment: Deployment, revision: Revision) -> bool:
        """Insert both; False when the name, the port or the exposed host is taken."""
        async with self._database.transaction() as connection:
            taken = sa.select(deployments.c.uid).where(
                sa.or_(
                    sa.and_(
                        deployments.c.organization == deployment.organization, deployments.c.name == deployment.name
                    ),
                    deployments.c.port == (deployment.port or -1),
                    deployments.c.exposed_host == (deployment.exposed_host or "-"),
                )
            )
            if (await connection.execute(taken)).first() is not None:
                return False
            try:
                await connection.execute(sa.insert(deployments).values(**_values(deployment)))
            except sa.exc.IntegrityError:
                await connection.rollback()
                return False
            await _insert_revision(connection, revision)
        return True

    async def change_deployment(self, deployment: Deployment, before: int, revision: Revision | None = None) -> None:
        """Write what is desired, where the generation still is `before`; status and build are left.

        Raises:
            Aborted: it has changed meanwhile (DEPLOYMENT_CHANGED), or somebody else has just taken its host.
        """
        values = _values(deployment)
        for observed in ("status", "build", "uid"):
            values.pop(observed)
        async with self._database.transaction() as connection:
            change = sa.update(deployments).where(
                deployments.c.uid == deployment.uid, deployments.c.generation == before
            )
            try:
                changed = (await connection.execute(change.values(**values))).rowcount
            except sa.exc.IntegrityError:
                await connection.rollback()
                changed = 0
            if changed != 1:
                raise Aborted("The deployment changed meanwhile; try again.", reason="DEPLOYMENT_CHANGED")
            if revision is not None:
                await _insert_revision(connection, revision)

    async def write_status(self, uid: str, status: Status) -> None:
        """Write what is observed."""
        await self._set(uid, status=json.dumps(_status_json(status)))

    async def write_build(self, uid: str, build: str) -> None:
        """Write which build the latest revision needs."""
        await self._set(uid, build=build)

    async def remove_deployment(self, uid: str) -> None:
        """Delete a deployment and its revisions."""
        async with self._database.transaction() as connection:
            await connection.execute(sa.delete(revisions).where(revisions.c.deployment_uid == uid))
            await connection.execute(sa.delete(deployments).where(deployments.c.uid == uid))

    async def get_revision(self, deployment_uid: str, number: int) -> Revision | None:
        """One revision."""
        query = sa.select(revisions).where(revisions.c.deployment_uid == deployment_uid, revisions.c.number == number)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else _revision(row)

    async def list_revisions(self, deployment_uid: str, *, below: int | None, limit: int) -> list[Revision]:
        """Revisions newest first, with numbers below `below`."""
        query = sa.select(revisions).where(revisions.c.deployment_uid == deployment_uid)
        if below is not None:
            query = query.where(revisions.c.number < below)
        query = query.order_by(revisions.c.number.desc()).limit(limit)
        async with self._database.read() as connection:
            return [_revision(row) for row in (await connection.execute(query)).mappings()]

    async def host_taken(self, host: str, uid: str) -> bool:
        """Whether a deployment other than `uid` has this exposed host."""
        query = sa.select(deployments.c.uid).where(deployments.c.exposed_host == host, deployments.c.uid != uid)
        async with self._database.read() as connection:
            return (await connection.execute(query)).first() is not None

    async def ports(self) -> set[int]:
        """Ports that deployments have."""
        query = sa.select(deployments.c.port).where(deployments.c.port.is_not(None))
        async with self._database.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def next_route_version(self, after: int) -> int:
        """A version greater than any before, over restarts too, and than `after`, which may not have been kept."""
        async with self._database.transaction() as connection:
            greatest = sa.case((route_tables.c.version > after, route_tables.c.version), else_=after)
            count = sa.update(route_tables).where(route_tables.c.id == 1).values(version=greatest + 1)
            if (await connection.execute(count)).rowcount == 0:
                first = insert_into(self._database.dialect, route_tables).values(id=1, version=after)
                await connection.execute(first.on_conflict_do_nothing())
                await connection.execute(count)
            version = await connection.execute(sa.select(route_tables.c.version).where(route_tables.c.id == 1))
            return int(version.scalar_one())

    async def ensure_cluster(self, name: str, uid: str, now: datetime) -> tuple[str, datetime]:
        """uid and creation time of a cluster, which is made when it is not there."""
        async with self._database.transaction() as connection:
            query = sa.select(clusters.c.uid, clusters.c.create_time).where(clusters.c.name == name)
            row = (await connection.execute(query)).one_or_none()
            if row is None:  # nothing is written otherwise: the disk may be full
                made = insert_into(self._database.dialect, clusters).values(name=name, uid=uid, create_time=now)
                await connection.execute(made.on_conflict_do_nothing())
                row = (await connection.execute(query)).one()
            return row[0], row[1]

    async def list_clusters(self) -> list[Cluster]:
        """All clusters, by name."""
        async with self._database.read() as connection:
            return [
                _cluster(row)
                for row in (await connection.execute(sa.select(clusters).order_by(clusters.c.name))).mappings()
            ]

    async def get_cluster(self, name: str) -> Cluster | None:
        """One cluster."""
        query = sa.select(clusters).where(clusters.c.name == name)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else _cluster(row)

    async def add_cluster(self, cluster: Cluster) -> bool:
        """Write a new cluster. False where there is one of that name."""
        async with self._database.transaction() as connection:
            made = insert_into(self._database.dialect, clusters).values(**_cluster_values(cluster))
            return (await connection.execute(made.on_conflict_do_nothing())).rowcount == 1

    async def change_cluster(self, cluster: Cluster) -> bool:
        """Write a changed cluster. False where somebody else changed it meanwhile."""
        values = _cluster_values(replace(cluster, generation=cluster.generation + 1))
        return await self._write_cluster(cluster.name, clusters.c.generation == cluster.generation, **values)

    async def remove_cluster(self, name: str) -> list[str]:
        """Delete a cluster without deployments; else gives some of their names, and nothing is deleted."""
        async with self._database.transaction() as connection:
            there = sa.select(deployments.c.name).where(deployments.c.cluster == name).order_by(deployments.c.name)
            found = list((await connection.execute(there.limit(5))).scalars())
            if not found:
                await connection.execute(sa.delete(clusters).where(clusters.c.name == name))
            return found

    async def owner_of(self, cluster: str) -> tuple[str, int]:
        """Which deployer has the cluster, empty for none, and its newest sign of life."""
        query = sa.select(clusters.c.owner, clusters.c.owner_signs).where(clusters.c.name == cluster)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one()
            return row[0], row[1]

    async def take_cluster(self, cluster: str, deployer: str, owner: str, sign: int) -> bool:
        """Take the cluster, where its owner and that one's sign of life still are these."""
        still = (clusters.c.owner == owner, clusters.c.owner_signs == sign)
        return await self._write_cluster(cluster, *still, owner=deployer, owner_signs=sign + 1)

    async def renew_cluster(self, cluster: str, deployer: str) -> bool:
        """Show a sign of life; False where another has taken the cluster."""
        mine = clusters.c.owner == deployer
        return await self._write_cluster(cluster, mine, owner_signs=clusters.c.owner_signs + 1)

    async def release_cluster(self, cluster: str, deployer: str) -> None:
        """Leave the cluster to whoever takes it."""
        await self._write_cluster(cluster, clusters.c.owner == deployer, owner="")

    async def _write_cluster(self, cluster: str, *where: sa.ColumnElement[bool], **values: Any) -> bool:
        async with self._database.transaction() as connection:
            statement = sa.update(clusters).where(clusters.c.name == cluster, *where).values(**values)
            return (await connection.execute(statement)).rowcount == 1

    async def _set(self, uid: str, **values: object) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(sa.update(deployments).where(deployments.c.uid == uid).values(**values))


async def _insert_revision(connection: AsyncConnection, revision: Revision) -> None:
    await connection.execute(
        sa.insert(revisions).values(
            deployment_uid=revision.deployment_uid,
            number=revision.number,
            uid=revision.uid,
            template=revision.template,
            bentos=json.dumps({target: asdict(bento) for target, bento in revision.bentos.items()}),
            creator=revision.creator,
            create_time=revision.create_time,
            rolled_back_to=revision.rolled_back_to,
        )
    )


def _values(deployment: Deployment) -> dict[str, Any]:
    values = {column.name: getattr(deployment, column.name) for column in deployments.columns}
    values["labels"] = json.dumps(dict(deployment.labels))
    values["status"] = json.dumps(_status_json(deployment.status))
    values["port"] = deployment.port or None
    return values


def _deployment(row: Any) -> Deployment:
    values = dict(row)
    values["labels"] = json.loads(row["labels"])
    values["port"] = row["port"] or 0
    values["status"] = _status(json.loads(row["status"]))
    return Deployment(**values)


def _cluster(row: Any) -> Cluster:
    values = {key: value for key, value in row.items() if key not in ("owner", "owner_signs")}
    return Cluster(**{**values, "namespaces": tuple(json.loads(values["namespaces"]))})


def _cluster_values(cluster: Cluster) -> dict[str, Any]:
    return {**asdict(cluster), "namespaces": json.dumps(cluster.namespaces)}


def _revision(row: Any) -> Revision:
    values = dict(row)
    values["bentos"] = {
        target: Bento(b["name"], b["digest"], b["manifest"], tuple(tuple(pair) for pair in b["models"]))
        for target, b in json.loads(row["bentos"]).items()
    }
    return Revision(**values)


def _status_json(status: Status) -> dict[str, Any]:
    values = asdict(status)
    for condition in values["conditions"]:
        time = condition["transition_time"]
        condition["transition_time"] = time.isoformat() if time else None
    return values


def _status(values: dict[str, Any]) -> Status:
    conditions = []
    for item in values["conditions"]:
        time = item["transition_time"]
        condition = Condition(**{**item, "transition_time": None})
        conditions.append(replace(condition, transition_time=datetime.fromisoformat(time) if time else None))
    counts = {service: tuple(counts) for service, counts in values["counts"].items()}
    return Status(**{**values, "conditions": tuple(conditions), "counts": counts})


__all__: Sequence[str] = ("Store", "metadata")
