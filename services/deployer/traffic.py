"""Which way requests go to each deployment, and which replicas may end since none comes to them any more."""

from collections.abc import Collection, Mapping, Sequence

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import routing
from services.deployer.addresses import Addresses
from services.deployer.domain import Deployment
from services.deployer.observed import Shift
from services.deployer.revisions import Revisions
from services.deployer.routes import Routes
from services.deployer.runtimes import Phase, Runtime, SetStatus
from services.kernel.clock import Clock


class Traffic:
    """See the module. `routes` is what gateways follow."""

    def __init__(self, routes: Routes, runtime: Runtime, revisions: Revisions, addresses: Addresses) -> None:
        self._table, self._runtime, self._revisions, self._addresses = routes, runtime, revisions, addresses
        self._routes: dict[str, pb.Route] = {}
        """By the uid of the deployment."""
        self._published = False
        """Whether these are what gateways were told."""
        self._waiting: set[str] = set()
        """Deployments with replicas of which not every gateway knows yet."""
        self._used = (-1, frozenset[int]())
        """What gateways used at the last pass, and which ports they were refused."""
        self._draining: dict[str, set[str]] = {}
        """Those that are to be ended once no gateway routes to them, by deployment."""
        self._gone: set[str] = set()
        """Those that are no more, of which the routes still know."""

    def reset(self) -> None:
        """Nothing is known, and nothing was published."""
        for known in (self._routes, self._draining):
            known.clear()
        for some in (self._waiting, self._gone):
            some.clear()
        self._published = False

    def forget(self, uid: str) -> None:
        """No request goes to a deployment that is no more."""
        self._set(uid, None)
        self._waiting.discard(uid)

    def take(self, shifts: Mapping[str, Shift]) -> None:
        """Replicas are others than before."""
        for uid, shift in shifts.items():
            self._gone |= shift.before.keys() - shift.now.keys()
            self._draining.pop(uid, None)
            if draining := {replica for replica, phase in shift.now.items() if phase is Phase.DRAINING}:
                self._draining[uid] = draining

    def differing(self, rows: Mapping[str, Deployment]) -> set[str]:
        """Deployments for which what gateways do is another than at the last pass."""
        used, refused = self._table.used(), self._table.refused_ports()
        found = set(self._waiting) if used != self._used[0] else set()
        if ports := refused ^ self._used[1]:
            found |= {uid for uid, row in rows.items() if row.port in ports}
        self._used = used, refused
        return found

    async def look(self, deployment: Deployment, sets: Sequence[SetStatus]) -> None:
        """Find the way to a deployment. Where that fails it keeps the one that it has."""
        uid = deployment.uid
        ready = [one.replica for each in sets for one in each.replicas if one.phase is Phase.READY]
        if all(self._table.routed(replica) for replica in ready):
            self._waiting.discard(uid)
        else:
            self._waiting.add(uid)
        self._set(uid, None if deployment.deleting else await self._route(deployment, sets))

    async def _route(self, deployment: Deployment, sets: Sequence[SetStatus]) -> pb.Route:
        latest = await self._revisions.get(deployment.uid, deployment.latest_revision)
        numbers = {latest.number, *(one.revision for one in sets)}
        versions = {number: await self._revisions.versions(deployment.uid, number) for number in numbers}
        return routing.route_of(deployment, latest, versions, sets, self._addresses.hosts(deployment))

    def _set(self, uid: str, route: pb.Route | None) -> None:
        if route == self._routes.get(uid):
            return
        self._published = False
        if route is None:
            del self._routes[uid]
        else:
            self._routes[uid] = route

    async def publish(self) -> None:
        """Tell gateways, unless they know."""
        if not self._published:
            await self._table.publish(self._routes.values())
            self._published = True

    async def release(self) -> None:
        """Have replicas ended that no gateway routes to, and forget those that are gone."""
        free = [replica for some in self._draining.values() for replica in some if self._table.unrouted(replica)]
        if free:
            await self._runtime.release(free)
        self._table.forget(self._gone)
        self._gone.clear()

    async def withdraw(self, replicas: Collection[str], clock: Clock) -> None:
        """Take replicas out of what gateways follow; gives back once none routes to them."""
        await self._table.publish([routing.without(each, replicas) for each in self._table.current().routes])
        while not all(self._table.unrouted(replica) for replica in replicas):
            await clock.sleep(0.05)
