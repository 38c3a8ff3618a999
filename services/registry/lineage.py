"""Use cases over uses: who says that what is used, and what is connected with a resource.

The registry knows by itself which models a bento uses. What deployments use only the deployer knows, and tells: it
*claims* before it writes a revision, so that no delete comes between, and *reports* whenever it looks at a deployment,
so that a claim or an end which a crash lost is made good. See ADR 16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from ekiben import names
from ekiben.errors import InvalidArgument
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.registry.catalog import no_version, organization_of
from services.registry.domain import Kind, Use, claimed_uses, reported_uses
from services.registry.store import catalog as catalog_rows
from services.registry.store import uses as rows
from services.registry.uploads import parse_resource

_CLAIM = timedelta(minutes=10)
"""From a claim to the report that confirms it are a transaction and a pass of a loop. A deployer that is away for
longer has not written what it claimed, or reports it when it is back."""

_KEPT = ("modelRepositories/", "bentoRepositories/")
"""How the names of what the registry keeps itself begin."""

MAX_USES = 1000
"""In one direction of a graph: what a person or a page can still look through."""


@dataclass(frozen=True)
class Node:
    """A resource of a graph. `present` is None for what the registry does not keep."""

    name: str
    distance: int
    present: bool | None = None
    deleted: bool = False
    digest: str = ""


@dataclass(frozen=True)
class Graph:
    """What is connected with a resource."""

    name: str
    nodes: Sequence[Node]
    uses: Sequence[Use]
    truncated: bool


@dataclass
class _Walk:
    """Uses found so far in one direction, and how far each resource is."""

    distances: dict[str, int] = field(default_factory=dict)
    uses: dict[tuple[str, str], Use] = field(default_factory=dict)


class Lineage:
    """What uses what."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def claim(self, organization: str, owner: str, owner_uid: str, generation: int, told: Sequence[Use]) -> None:
        """Make uses live before they are. A model or bento that is named cannot be deleted from then on.

        Raises:
            NotFound: a model or bento is not there (MODEL_NOT_FOUND, BENTO_NOT_FOUND); nothing is claimed.
        """
        now = self._clock.now()
        async with self._database.transaction() as connection:
            for resource in sorted({use.resource for use in told}):  # one order for all, so no deadlock
                if not resource.startswith("builds/"):
                    kind, repository, version = parse_resource(resource)
                    found = await catalog_rows.version(connection, organization, kind, repository, version, lock=True)
                    if found is None:
                        raise no_version(kind, repository, version)
            known = await rows.of_owner(connection, organization, owner_uid)
            written = claimed_uses(known, told, generation, now, now + _CLAIM)
            await rows.put(connection, organization, owner, owner_uid, written)

    async def report(
        self, organization: str, owner: str, owner_uid: str, generation: int, told: Sequence[Use], *, gone: bool
    ) -> None:
        """Take over what an owner uses now; nothing is written where nothing changed."""
        if gone and told:
            raise InvalidArgument("An owner that is gone uses nothing.", reason="USES_INVALID")
        async with self._database.transaction() as connection:
            known = await rows.of_owner(connection, organization, owner_uid)
            written = reported_uses(known, told, generation, self._clock.now(), gone=gone)
            await rows.put(connection, organization, owner, owner_uid, written)

    async def owners(self, prefix: str, size: int, after: str) -> tuple[list[tuple[str, str, str]], str]:
        """A page of (organization, name, uid) of who has live uses, by uid, and the uid after which it goes on."""
        async with self._database.read() as connection:
            found = await rows.owners(connection, prefix, self._clock.now(), size + 1, after)
        return found[:size], found[size - 1][2] if len(found) > size else ""

    async def graph(self, caller: Principal, name: str, *, live_only: bool) -> Graph:
        """All that a resource uses and all that uses it.

        Raises:
            InvalidArgument: no name of a model, bento, deployment, revision or build (NAME_INVALID).
            NotFound: there neither is nor was such a model or bento.
        """
        organization = organization_of(caller)
        async with self._database.read() as connection:
            name = await self._resolved(connection, organization, name)
            up, down, own = _Walk({name: 0}), _Walk({name: 0}), []
            if name.startswith("deployments/") and "/revisions/" not in name:
                own = await self._revisions(connection, organization, name, up, live_only=live_only)
            truncated = await self._walk(connection, organization, up, used=True, live_only=live_only)
            truncated |= await self._walk(connection, organization, down, used=False, live_only=live_only)
            distances = {other: -far for other, far in up.distances.items()} | down.distances
            nodes = await self._nodes(connection, organization, distances)
        found = [*own, *(up.uses | down.uses).values()]
        found.sort(key=lambda use: (not use.live, use.consumer, use.resource))
        if len(nodes) == 1 and nodes[0].present is False and not nodes[0].deleted:
            raise no_version(*parse_resource(name))
        return Graph(name, nodes, found, truncated)

    async def _resolved(self, connection: AsyncConnection, organization: str, name: str) -> str:
        if name.startswith("builds/"):
            return str(names.Build.parse(name))
        if name.startswith("deployments/"):
            revision = "/revisions/" in name
            return str(names.Revision.parse(name) if revision else names.Deployment.parse(name))
        if not name.startswith(_KEPT):
            raise InvalidArgument(
                f"{name[:100]!r} has no lineage here. Name a model, a bento, a deployment, a revision or a build; of a "
                "prediction, the revision that answered.",
                reason="NAME_INVALID",
                violations=[("name", "must name a model, a bento, a deployment, a revision or a build")],
                name=name[:200],
            )
        kind, repository, version = parse_resource(name)
        found = await catalog_rows.meant(connection, organization, kind, repository, version)
        return name if found is None else found[1].name

    async def _revisions(
        self, connection: AsyncConnection, organization: str, name: str, up: _Walk, *, live_only: bool
    ) -> list[Use]:
        """The uses of a deployment's revisions by the deployment, made from what these use."""
        found = await rows.consumers_of_owner(connection, organization, name, live_only=live_only, limit=MAX_USES)
        own: dict[str, Use] = {}
        for use in found:
            up.distances.setdefault(use.consumer, 1)
            before = own.get(use.consumer_uid)
            if before is None or (use.live and not before.live):
                own[use.consumer_uid] = Use(
                    name, "", use.consumer, live=use.live, create_time=use.create_time, end_time=use.end_time
                )
        return list(own.values())

    async def _walk(
        self, connection: AsyncConnection, organization: str, walk: _Walk, *, used: bool, live_only: bool
    ) -> bool:
        """Breadth first; whether it ended early."""
        edge, far = list(walk.distances), max(walk.distances.values())
        while edge:
            room = MAX_USES + 1 - len(walk.uses)
            found = await rows.neighbours(connection, organization, edge, used=used, live_only=live_only, limit=room)
            far, edge = far + 1, []
            for use in found[: room - 1]:
                walk.uses[use.key] = use
                other = use.resource if used else use.consumer
                if other not in walk.distances:
                    walk.distances[other] = far
                    edge.append(other)
            if len(found) >= room:
                return True
        return False

    async def _nodes(self, connection: AsyncConnection, organization: str, distances: Mapping[str, int]) -> list[Node]:
        kept: dict[tuple[Kind, str], list[str]] = {}
        for name in distances:
            if name.startswith(_KEPT):
                kind, repository, version = parse_resource(name)
                kept.setdefault((kind, repository), []).append(version)
        present, deleted = await rows.presence(connection, organization, kept, self._clock.now())
        found = []
        for name, distance in distances.items():
            there = name in present if name.startswith(_KEPT) else None
            found.append(Node(name, distance, there, not there and name in deleted, present.get(name, "")))
        return sorted(found, key=lambda node: (abs(node.distance), node.name))
