"""Loop: follows the deployer's route table and has Envoy use it.

The order of a change is such that no request meets a gap: endpoints and clusters first, then the routes to them, then
the listeners; clusters that no route names any more stay for a while, for the requests that are in them.
"""

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import EkibenError, Unavailable
from services.content.files import write_whole
from services.gateway import listeners, messages, routes
from services.gateway.domain import Route, RouteTable, cluster_of
from services.gateway.envoy import Envoy
from services.gateway.settings import Settings
from services.gateway.xds import Files, live
from services.kernel.clock import Clock

if TYPE_CHECKING:
    from ekiben.deployer.v1.deployer_pb2_grpc import RoutesAsyncStub

log = logging.getLogger(__name__)

LIVE_TIMEOUT_S = 10.0
"""A change is live in under 0.1 s with 1,000 deployments; an Envoy that is being started again needs longer."""
SETTLE_S = 0.05
"""Envoy's workers learn of a change a moment after its statistics show it (30 ms were enough for 10,000 requests)."""
LINGER_S = 30.0
"""How long a cluster without routes stays."""
RETRY_PORT_S = 10.0
"""How long a port that could not be bound is left out before the next try."""


class Watcher:
    """The route table as Envoy has it."""

    def __init__(
        self,
        settings: Settings,
        plan: listeners.Plan,
        peers: Sequence[messages.Peer],
        files: Files,
        envoy: Envoy,
        deployer: "RoutesAsyncStub",
        clock: Clock,
    ) -> None:
        self.table = RouteTable()
        """The newest table that was read."""
        self.live_version: int | None = None
        """Version of the table that Envoy uses; None before the first, see `restore`."""
        self.connected = False
        """Whether the deployer's stream is open."""
        self._id = f"{socket.gethostname()}-{uuid.uuid4()}"
        self._settings = settings
        self._plan = plan
        self._peers = peers
        self._files = files
        self._envoy = envoy
        self._deployer = deployer
        self._clock = clock
        self._changed = asyncio.Event()
        self._gone: dict[str, tuple[messages.Resource, float]] = {}
        self._clusters: dict[str, messages.Resource] = {}
        self._written: list[messages.Resource] = []
        """What the file of clusters holds."""
        self._clusters_version = ""
        self._tables = messages.Tables()
        self._made: dict[str, tuple[Route, dict[str, messages.Resource], dict[str, str]]] = {}
        """By deployment: the route of which these clusters, and files of endpoints with these versions, were made."""
        self._ports: set[int] = set()
        """Own ports that Envoy listens on."""
        self._refused: dict[int, float] = {}
        """Own ports that could not be bound, and when to try again."""
        self._stored = False
        self._failed_once = False

    async def restore(self) -> None:
        """Write Envoy's files from the last table that was kept, for the time until the deployer answers."""
        kept = pb.RouteTable()
        with contextlib.suppress(OSError, DecodeError):
            kept.ParseFromString(self._table_file.read_bytes())
            self._stored = True
        self.table = self._tables.read(kept)
        if self._envoy.adopted:
            self._ports = {route.port for route in self.table.routes if route.port}
        self._write_clusters(self.table)
        self._write_routes(self.table)
        self._write_listeners(self.table)

    def check(self) -> None:
        """Raises Unavailable until Envoy uses a table: the deployer's, or the kept one where the deployer is away."""
        if self.live_version is None and not (self._stored and self._failed_once):
            raise Unavailable("The routes have not come from the deployer yet.", reason="ROUTES_MISSING")

    async def run(self) -> None:
        """Follow, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._apply_changes())

    async def _follow(self) -> None:
        pause_s = 0.1
        while True:
            call = self._deployer.WatchRoutes(pb.WatchRoutesRequest(gateway=self._id))
            try:
                async for table in call:
                    self.connected, pause_s = True, 0.1
                    self._take(table)
            except EkibenError as exc:
                log.info("the deployer's routes cannot be followed", extra={"error": str(exc)})
            finally:
                call.cancel()
                self.connected, self._failed_once = False, True
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    def _take(self, table: pb.RouteTable) -> None:
        self.table = self._tables.read(table)
        try:
            write_whole(self._table_file, table.SerializeToString(), durable=False)
        except OSError as exc:
            log.error("the route table cannot be kept for a restart", extra={"error": str(exc)})
        self._changed.set()

    async def _apply_changes(self) -> None:
        pause_s = 0.1
        while True:
            await self._wait_for_work()
            self._changed.clear()
            table = self.table
            try:
                await self._apply(table)
                if self._failed_or_live(table):
                    await self._deployer.AcknowledgeRoutes(
                        pb.AcknowledgeRoutesRequest(
                            gateway=self._id, version=table.version, refused_ports=sorted(self._refused)
                        )
                    )
                pause_s = 0.1
            except (EkibenError, OSError, ValueError) as exc:
                log.error("a change of the routes is not live yet", extra={"version": table.version, "error": str(exc)})
                self._changed.set()
                await self._clock.sleep(pause_s)
                pause_s = min(pause_s * 2, 5.0)

    def _failed_or_live(self, table: RouteTable) -> bool:
        return self.connected and self.live_version == table.version

    async def _wait_for_work(self) -> None:
        deadlines = [until for _, until in self._gone.values()] + list(self._refused.values())
        wait_s = max(0.0, min(deadlines) - self._clock.monotonic()) if deadlines else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._changed.wait()

    async def _apply(self, table: RouteTable) -> None:
        """Have Envoy use a table. What it uses already costs nothing.

        Raises:
            Unavailable: Envoy did not take it in time (ROUTES_NOT_LIVE).
        """
        await self._until_live(self._write_clusters(table))
        await self._until_live(self._write_routes(table))
        await self._listen(table)
        await self._clock.sleep(SETTLE_S)
        self.live_version = table.version
        # Route files of listeners that are gone, and clusters that nobody uses.
        self._files.keep_only(
            routes=["public", *(f"port_{route.id}" for route in table.routes if route.port)],
            clusters=[name for name in self._clusters if name not in {peer.name for peer in self._peers}],
        )

    def _write_clusters(self, table: RouteTable) -> dict[str, str]:
        now = self._clock.monotonic()
        wanted: dict[str, messages.Resource] = {peer.name: messages.peer_cluster(peer) for peer in self._peers}
        endpoints: dict[str, str] = {}
        before, self._made = self._made, {}
        for route in table.routes:
            made = before.get(route.deployment)
            if made is None or made[0] is not route or not self._there(made[2]):
                made = route, *self._write_endpoints(route)
            self._made[route.deployment] = made
            wanted |= made[1]
            endpoints |= made[2]
        versions = {f"cluster.{name}.version_text": version for name, version in endpoints.items()}
        for name in self._clusters.keys() - wanted.keys():
            self._gone.setdefault(name, (self._clusters[name], now + LINGER_S))
        self._gone = {
            name: (cluster, until)
            for name, (cluster, until) in self._gone.items()
            if until > now and name not in wanted
        }
        self._clusters = {**wanted, **{name: cluster for name, (cluster, _) in self._gone.items()}}
        resources = [self._clusters[name] for name in sorted(self._clusters)]
        if resources != self._written or not self._files.holds(self._files.clusters, self._clusters_version):
            self._clusters_version = self._files.write(self._files.clusters, resources)
            self._written = resources
        versions["cluster_manager.cds.version_text"] = self._clusters_version
        return versions

    def _write_endpoints(self, route: Route) -> tuple[dict[str, messages.Resource], dict[str, str]]:
        """Write the files of a route's clusters. Gives these, and the versions of the files, by name."""
        clusters, versions = {}, {}
        for target in route.targets:
            name = cluster_of(route.deployment, target.target, target.revision)
            facts = messages.facts_of(route, target)
            clusters[name] = messages.replica_cluster(name, self._files.endpoints(name), facts)
            endpoints = messages.replica_endpoints(name, target.endpoints)
            versions[name] = self._files.write(self._files.endpoints(name), [endpoints])
        for each in route.internal_routes:
            name = cluster_of(route.deployment, each.target, each.revision, each.service)
            clusters[name] = messages.replica_cluster(name, self._files.endpoints(name))
            endpoints = messages.replica_endpoints(name, each.endpoints)
            versions[name] = self._files.write(self._files.endpoints(name), [endpoints])
        return clusters, versions

    def _there(self, versions: Mapping[str, str]) -> bool:
        return all(self._files.holds(self._files.endpoints(name), version) for name, version in versions.items())

    def _write_routes(self, table: RouteTable) -> dict[str, str]:
        public = routes.public_routes(
            table,
            domain=self._settings.domain,
            api_hosts=self._settings.api_hosts,
            peers=[peer.name for peer in self._peers],
        )
        versions = {"http.public.rds.public.version_text": self._files.write(self._files.routes("public"), [public])}
        for route in table.routes:
            if route.port:
                own = routes.own_port_routes(route)
                version = self._files.write(self._files.routes(own["name"]), [own])
                if route.port in self._ports:
                    versions[f"http.deployments.rds.{own['name']}.version_text"] = version
        return versions

    async def _listen(self, table: RouteTable) -> None:
        versions, by_listener = self._write_listeners(table)
        try:
            await self._until_live(versions)
        except Unavailable:
            # One listener that Envoy refuses makes it refuse the file's version, though it uses the others.
            refused = await self._envoy.admin.refused_listeners()
            if not refused:
                raise
            for name, why in refused.items():
                log.error("envoy refuses a listener", extra={"listener": name, "error": why})
                if port := by_listener.get(name):
                    self._refuse(port)
            versions, _ = self._write_listeners(table)
            await self._until_live(versions)

    def _write_listeners(self, table: RouteTable) -> tuple[dict[str, str], dict[str, int]]:
        """Gives the versions to wait for, and the own ports by the names of their listeners."""
        resources = [listeners.public_listener(self._plan, self._files.routes("public"))]
        ports: dict[int, str] = {}
        wanted = {route.port for route in table.routes}
        for route in table.routes:
            if route.port and route.port not in ports and self._bindable(route.port):
                resource = listeners.own_port_listener(self._plan, route, self._files.routes(f"port_{route.id}"))
                ports[route.port] = resource["name"]
                resources.append(resource)
            for each in route.internal_routes:
                Path(each.socket_path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                name = cluster_of(route.deployment, each.target, each.revision, each.service)
                resources.append(listeners.internal_listener(self._plan, each, name))
        self._ports = set(ports)
        self._refused = {port: until for port, until in self._refused.items() if port in wanted}
        version = self._files.write(self._files.listeners, resources)
        return {"listener_manager.lds.version_text": version}, {name: port for port, name in ports.items()}

    def _bindable(self, port: int) -> bool:
        """Whether a port can be given to Envoy. One that cannot is left out, so that the rest is served."""
        if port in self._ports:
            return True
        now = self._clock.monotonic()
        if self._refused.get(port, 0.0) > now:
            return False
        why = why_not_bindable(self._plan.host, port)
        if why is None:
            self._refused.pop(port, None)
            return True
        if port not in self._refused:  # Once: it is tried again every few seconds.
            log.error("a deployment's own port cannot be bound", extra={"port": port, "error": why})
        self._refuse(port)
        return False

    def _refuse(self, port: int) -> None:
        self._ports.discard(port)
        self._refused[port] = self._clock.monotonic() + RETRY_PORT_S

    async def _until_live(self, versions: Mapping[str, str]) -> None:
        deadline = self._clock.monotonic() + LIVE_TIMEOUT_S
        pause_s = 0.002
        while True:
            shown: dict[str, str] = {}
            with contextlib.suppress(Unavailable):  # It may be starting again.
                shown = await self._envoy.admin.versions()
                if live(versions, shown):
                    return
            if self._clock.monotonic() > deadline:
                missing = sorted(name for name in versions if shown.get(name) != versions[name])
                raise Unavailable(f"Envoy does not use {', '.join(missing)}.", reason="ROUTES_NOT_LIVE")
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    @property
    def _table_file(self) -> Path:
        return self._settings.data_dir / "routes.pb"


def why_not_bindable(host: str, port: int) -> str | None:
    """Why nothing can listen there, or None where it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            return exc.strerror or str(exc)
    return None
