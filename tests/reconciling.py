"""A reconciler with many deployments, real rows in SQLite, and a runtime in memory whose replicas answer at once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import images_pb2
from services.deployer.addresses import Addresses
from services.deployer.builds import Builds, Output
from services.deployer.domain import DEFAULT_CLUSTER, Deployment
from services.deployer.ownership import Ownership
from services.deployer.reconciler import Reconciler
from services.deployer.runtimes import Phase, ReplicaStatus, SetSpec, SetStatus
from services.deployer.runtimes.exposures import Exposed
from services.deployer.settings import Settings
from services.deployer.store import Store
from services.deployer.uses import Uses
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.settings import DatabaseSettings
from services.kernel.watches import Topic
from tests.deployment_rows import BENTO, a_deployment, a_revision

IMAGE = f"docker://registry.test/iris@sha256:{'ab' * 32}"
GATEWAY = "gateway"


class MemoryRuntime:
    """Implements Runtime: what is applied is ready at once, what is scaled down drains until it is released."""

    def __init__(self) -> None:
        self.sets: dict[str, SetStatus] = {}
        self.applied: list[str] = []
        """Keys, in the order of the calls."""
        self.exposed: list[Sequence[Exposed]] = []
        self.stood_by = 0
        self.known = True
        """Whether it has told all that is there."""
        self.silent: set[str] = set()
        """Places that do not tell."""
        self._made = 0
        self._moved = asyncio.Event()

    def scales(self, place: str) -> bool:
        return False

    def knows(self, place: str) -> bool:
        return self.known and place not in self.silent

    async def check(self, spec: SetSpec) -> None: ...

    async def apply(self, spec: SetSpec, replicas: int) -> None:
        self.applied.append(spec.key)
        known = self.sets.get(spec.key)
        if known is None:
            which = (spec.deployment, spec.deployment_uid, spec.revision, spec.target, spec.service)
            known = self.sets[spec.key] = SetStatus(spec.key, *which, 0)
        await self.scale(spec.key, replicas)

    async def scale(self, key: str, replicas: int) -> None:
        known = self.sets.get(key)
        if known is None:
            return
        active = [one for one in known.replicas if one.phase is not Phase.DRAINING]
        leaving = [one for one in known.replicas if one.phase is Phase.DRAINING]
        leaving += [replace(one, phase=Phase.DRAINING) for one in active[replicas:]]
        for _ in range(replicas - len(active)):
            self._made += 1
            active.append(ReplicaStatus(f"r{self._made}", Phase.READY, f"10.0.0.1:{self._made}"))
        self.put(replace(known, asked=replicas, replicas=(*active[:replicas], *leaving)))

    async def release(self, replicas: Collection[str]) -> None:
        for one in list(self.sets.values()):
            if any(replica.replica in replicas for replica in one.replicas):
                self.put(replace(one, replicas=tuple(r for r in one.replicas if r.replica not in replicas)))

    def put(self, one: SetStatus) -> None:
        """Let a set be so."""
        self.sets[one.key] = one
        if not one.asked and not one.replicas:
            del self.sets[one.key]
        self._moved.set()

    async def observe(self) -> list[SetStatus]:
        self._moved.clear()
        return list(self.sets.values())

    async def drain(self, grace_s: float) -> None: ...

    async def changed(self) -> None:
        await self._moved.wait()

    async def forget(self, deployment_uid: str) -> None: ...

    async def expose(self, wanted: Sequence[Exposed]) -> None:
        self.exposed.append(wanted)

    async def stand_by(self) -> None:
        self.stood_by += 1


class Lineage:
    """A registry that is told of uses."""

    def __init__(self) -> None:
        self.reported: list[str] = []

    async def ReportUses(self, request: Any) -> None:
        self.reported.append(request.owner.name)


@dataclass
class Bench:
    """See the module."""

    store: Store
    reconciler: Reconciler
    runtime: MemoryRuntime
    lineage: Lineage
    uses: Uses
    clock: ManualClock
    database: Database
    statements: Counter[str]
    """SQL statements by their first word, since `counted`."""

    async def add(self, name: str, *, replicas: int = 1, cluster: str = DEFAULT_CLUSTER) -> Deployment:
        """A new deployment, as the API writes one."""
        template = pb.Template(bento=BENTO, image=images_pb2.PrebuiltImage(reference=IMAGE))
        scaling, now = {"Iris": pb.Scaling(min_replicas=replicas)}, self.clock.now()
        made = a_deployment(name, cluster=cluster, scaling=scaling, create_time=now, update_time=now)
        revision = replace(a_revision(made, template), create_time=now)
        assert await self.store.add_deployment(made, revision)
        self.reconciler.wake(made.uid)
        return made

    async def change(self, name: str, **values: Any) -> None:
        """Change what is desired of a deployment, as the API does it."""
        before = await self.store.get_deployment("organizations/default", name)
        assert before is not None
        after = replace(before, generation=before.generation + 1, **values)
        await self.store.change_deployment(after, before.generation)
        self.reconciler.wake(before.uid)

    async def turn(self, seconds: float = 1.0) -> None:
        """One pass, and a gateway that has taken what there is."""
        await self.clock.advance(seconds)
        await self.reconciler.turn()
        self.reconciler.routes.acknowledge(GATEWAY, self.reconciler.routes.current().version)

    def counted(self) -> None:
        """Count from now on."""
        self.statements.clear()
        self.runtime.applied.clear()
        self.lineage.reported.clear()


@asynccontextmanager
async def reconciling(folder: Path, **settings: Any) -> AsyncIterator[Bench]:
    """A reconciler that owns its cluster and is moved by hand, with a gateway that follows its routes."""
    clock, runtime, lineage = ManualClock(), MemoryRuntime(), Lineage()
    url = f"sqlite:///{folder / 'deployer.db'}"
    given = Settings(database_url=url, data_dir=folder, run_dir=Path("/tmp/e"), port_range="none", **settings)
    async with open_database(DatabaseSettings(database_url=url)) as database:
        await database.migrate("services.deployer.migrations")
        store, topic = Store(database), Topic()
        await store.ensure_cluster(DEFAULT_CLUSTER, "cluster", clock.now())
        ownership = Ownership(store, DEFAULT_CLUSTER, "me", clock, lease_s=15.0)
        await ownership.look()
        uses = Uses(store, lineage, clock)
        builds = Builds(None, None, Output.IMAGE, clock)
        reconciler = Reconciler(
            store,
            runtime,  # type: ignore[arg-type]
            builds,
            None,
            uses,
            ownership,
            topic,
            given,
            {},
            clock,
            Addresses(given),
        )
        statements: Counter[str] = Counter()
        for engine in (database.engine, database._reader):

            def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
                statements[statement.split(maxsplit=1)[0]] += 1

            sa.event.listen(engine.sync_engine, "before_cursor_execute", count)
        watching = reconciler.routes.watch(GATEWAY)
        opened = asyncio.Event()

        async def listen() -> None:
            async with asyncio.TaskGroup() as tasks:
                reconciler.open(tasks)
                opened.set()

        listening, first = asyncio.ensure_future(listen()), asyncio.ensure_future(anext(watching))
        await opened.wait()
        try:
            yield Bench(store, reconciler, runtime, lineage, uses, clock, database, statements)
        finally:
            for task in (listening, first):
                task.cancel()
            await asyncio.wait([listening, first])
            await watching.aclose()  # type: ignore[attr-defined]
