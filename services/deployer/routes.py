"""The route table: where requests go, who follows it, and what each follower routes by.

A version once given is never given to another table, over restarts too. A gateway acknowledges the version that its
data plane uses; a replica that a table leaves out can be stopped once every gateway has acknowledged it. Where no
gateway has watched for a while there is nobody whose requests could be lost.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import Aborted, ResourceExhausted, Unavailable
from services.kernel.clock import Clock
from services.kernel.watches import Topic

log = logging.getLogger(__name__)

NOBODY_S = 2.0
"""After so long without a gateway its absence is no restart of its connection."""


class Routes:
    """See the module."""

    def __init__(self, next_version: Callable[[int], Awaitable[int]], clock: Clock, wake: Callable[[], None]) -> None:
        """`next_version` gives a version greater than any before and than the one it is told."""
        self._next_version, self._clock, self._wake = next_version, clock, wake
        self._routes: dict[tuple[str, str], pb.Route] = {}
        """By deployment and its uid."""
        self._version = 0
        self._table = pb.RouteTable()
        self._publishing = asyncio.Lock()
        self._published = False
        self._closed = False
        self._acknowledged: dict[str, int] = {}
        self._watchers: dict[str, int] = {}
        self._refused: dict[str, frozenset[int]] = {}
        self._alone_since = clock.monotonic()
        self._topic = Topic()
        self._included: dict[str, int] = {}
        self._excluded: dict[str, int] = {}
        self._routed: set[str] = set()

    async def publish(self, routes: Iterable[pb.Route]) -> None:
        """Make these the routes, if they differ from those there are. A route that was given is not changed after."""
        async with self._publishing:
            named = {(route.deployment, route.uid): route for route in routes}
            # Of thousands nearly all are the very ones that were given the last time.
            differ = [
                name
                for name in named.keys() | self._routes.keys()
                if (route := named.get(name)) is not (known := self._routes.get(name)) and route != known
            ]
            if self._published and not differ:
                return
            version = await self._new_version()
            for name in differ:
                self._note(_replicas(self._routes.get(name)), _replicas(named.get(name)), version)
            self._routes, self._version, self._published = named, version, True
        self._topic.notify()

    def _note(self, before: set[str], after: set[str], version: int) -> None:
        for replica in after - self._included.keys():
            self._included[replica] = version
            self._excluded.pop(replica, None)
        for replica in before - after:
            self._included.pop(replica, None)
            self._routed.discard(replica)
            self._excluded[replica] = version

    async def _new_version(self) -> int:
        try:
            return await self._next_version(self._version)
        except (Aborted, ResourceExhausted, Unavailable) as exc:
            # Where requests go must not hang on a full disk: a deployer that was started on one would leave
            # every gateway without routes. Such a version is far greater than any that is counted.
            version = max(self._version + 1, int(self._clock.now().timestamp() * 1e6))
            log.warning("a version of the routes could not be kept", extra={"version": version, "error": str(exc)})
            return version

    def close(self) -> None:
        """Another deployer has the routes: end every watch, and know nothing of replicas any more."""
        self._closed, self._published, self._routes = True, False, {}
        self._included.clear()
        self._excluded.clear()
        self._routed.clear()
        self._topic.notify()

    def open(self) -> None:
        """The routes are this deployer's; watches give them once they are published."""
        self._closed = False

    def current(self) -> pb.RouteTable:
        """The table as it was published last."""
        if self._table.version != self._version:
            routes = [self._routes[name] for name in sorted(self._routes)]
            self._table = pb.RouteTable(version=self._version, routes=routes)
        return self._table

    async def watch(self, gateway: str) -> AsyncIterator[pb.RouteTable]:
        """The table now and after each change. Raises Unavailable (DEPLOYER_STANDBY) while the routes are another's."""
        self._check_open()
        self._watchers[gateway] = self._watchers.get(gateway, 0) + 1
        self._acknowledged.setdefault(gateway, 0)
        sent = -1
        try:
            # Now and then even without a change: a gateway that is gone shows by the failing write.
            async for _ in self._topic.changes(at_most_s=15.0):
                self._check_open()
                if self._published and self._version != sent:
                    sent = self._version
                    yield self.current()
        finally:
            self._watchers[gateway] -= 1
            if not self._watchers[gateway]:
                del self._watchers[gateway]
                self._acknowledged.pop(gateway, None)
                self._refused.pop(gateway, None)
                self._alone_since = self._clock.monotonic()
                self._wake()

    def acknowledge(self, gateway: str, version: int, refused_ports: Iterable[int] = ()) -> None:
        """A gateway routes by this version, but for own ports that it was refused. A version that was not given here
        is of a former deployer."""
        if gateway in self._watchers and version <= self._version:
            self._refused[gateway] = frozenset(refused_ports)
            self._acknowledged[gateway] = max(version, self._acknowledged.get(gateway, 0))
            self._wake()

    def routed(self, replica: str) -> bool:
        """Whether every gateway can reach the replica. Stays so while a gateway starts again."""
        if replica in self._included and self.used() >= self._included[replica]:
            self._routed.add(replica)
        return replica in self._routed

    def refused(self, port: int) -> bool:
        """Whether a gateway cannot listen at this port, since somebody else does."""
        return port in self.refused_ports()

    def refused_ports(self) -> frozenset[int]:
        """All the ports at which a gateway cannot listen."""
        return frozenset().union(*self._refused.values())

    def unrouted(self, replica: str) -> bool:
        """Whether no gateway sends requests to the replica any more."""
        return replica not in self._included and self.used() >= self._excluded.get(replica, self._version)

    def forget(self, gone: Iterable[str]) -> None:
        """Drop what is known of replicas that are no more."""
        for replica in gone:
            self._excluded.pop(replica, None)

    def used(self) -> int:
        """The oldest version that any gateway may still use."""
        if self._watchers:
            return min(self._acknowledged.get(gateway, 0) for gateway in self._watchers)
        if self._clock.monotonic() - self._alone_since >= NOBODY_S:
            return self._version
        return 0

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("Another deployer has the routes of this cluster.", reason="DEPLOYER_STANDBY")


def _replicas(route: pb.Route | None) -> set[str]:
    if route is None:
        return set()
    endpoints = [*(target.endpoints for target in route.targets), *(one.endpoints for one in route.internal_routes)]
    return {endpoint.replica for some in endpoints for endpoint in some}
