"""The deployer's gRPC services: parse, call a use case, format."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty

from ekiben.deployer.v1 import clusters_pb2, events_pb2
from ekiben.deployer.v1 import clusters_pb2_grpc as cluster_stubs
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import deployer_pb2_grpc as stubs
from ekiben.deployer.v1 import events_pb2_grpc as event_stubs
from ekiben.errors import InvalidArgument, NotFound
from services.deployer import domain, messages
from services.deployer.addresses import Addresses
from services.deployer.clusters import Clusters
from services.deployer.deployments import Deployments
from services.deployer.domain import Deployment, Revision
from services.deployer.reconciler import Reconciler
from services.deployer.runtimes import Runtime
from services.deployer.settings import Settings
from services.kernel import pages
from services.kernel.identity import current_principal

WATCH_S = 5.0
"""A watch looks at the rows this often even when nobody says that they changed: another process may have."""
_LAST_LINES = 100
"""Of each replica's log, for who does not say how many."""


class DeploymentsServicer(stubs.DeploymentsServicer):
    """ekiben.deployer.v1.Deployments."""

    def __init__(
        self, deployments: Deployments, reconciler: Reconciler, runtime: Runtime, addresses: Addresses
    ) -> None:
        self._deployments, self._reconciler, self._runtime = deployments, reconciler, runtime
        self._addresses = addresses

    def _formatted(self, found: tuple[Deployment, Revision]) -> pb.Deployment:
        return messages.deployment(*found, self._addresses.urls(found[0]))

    async def GetDeployment(self, request: pb.GetDeploymentRequest, context: Any) -> pb.Deployment:
        """One deployment."""
        return self._formatted(await self._deployments.get(current_principal().organization, request.name))

    async def ListDeployments(self, request: pb.ListDeploymentsRequest, context: Any) -> pb.ListDeploymentsResponse:
        """A page of deployments."""
        size, after = pages.page_size(request.page_size), pages.decode(request, int, str)
        found = await self._deployments.search(current_principal().organization, request.filter)
        rest = [one for one in found if after is None or _position(one) > after]
        page = rest[:size]
        token = pages.encode(request, *_position(page[-1])) if len(rest) > size else ""
        shown = [self._formatted((one, await self._deployments.latest(one))) for one in page]
        return pb.ListDeploymentsResponse(deployments=shown, next_page_token=token, total_size=len(found))

    async def CreateDeployment(self, request: pb.CreateDeploymentRequest, context: Any) -> pb.Deployment:
        """A new deployment."""
        found = await self._deployments.create(
            request.deployment, current_principal(), validate_only=request.validate_only
        )
        return self._formatted(found)

    async def UpdateDeployment(self, request: pb.UpdateDeploymentRequest, context: Any) -> pb.Deployment:
        """A changed deployment."""
        found = await self._deployments.update(
            request.deployment,
            request.update_mask if request.HasField("update_mask") else None,
            current_principal(),
            validate_only=request.validate_only,
        )
        return self._formatted(found)

    async def RollbackDeployment(self, request: pb.RollbackDeploymentRequest, context: Any) -> pb.Deployment:
        """Back to an old revision."""
        caller = current_principal()
        return self._formatted(
            await self._deployments.rollback(caller.organization, request.name, request.revision, caller)
        )

    async def ScaleDeployment(self, request: pb.ScaleDeploymentRequest, context: Any) -> pb.Deployment:
        """Another number of replicas."""
        organization = current_principal().organization
        found = await self._deployments.scale(organization, request.name, request.service, request.replicas)
        return self._formatted(found)

    async def TerminateDeployment(self, request: pb.TerminateDeploymentRequest, context: Any) -> pb.Deployment:
        """Nothing of it runs any more."""
        return self._formatted(await self._deployments.terminate(current_principal().organization, request.name))

    async def DeleteDeployment(self, request: pb.DeleteDeploymentRequest, context: Any) -> pb.Deployment:
        """Nothing of it is left."""
        organization = current_principal().organization
        return self._formatted(await self._deployments.delete(organization, request.name, request.etag))

    async def WatchDeployment(self, request: pb.WatchDeploymentRequest, context: Any) -> AsyncIterator[pb.Deployment]:
        """The deployment now and after each change; ends when it is gone."""
        organization = current_principal().organization
        uid = (await self._deployments.get(organization, request.name))[0].uid
        sent = None
        async with contextlib.aclosing(self._reconciler.topic.changes(uid, at_most_s=WATCH_S)) as changes:  # type: ignore[type-var]
            async for _ in changes:
                try:
                    found = await self._deployments.get(organization, request.name)
                except NotFound:
                    if sent is None:
                        raise
                    return
                if found[0].uid != uid:
                    return
                shown = self._formatted(found)
                if shown != sent:
                    sent = shown
                    yield shown

    async def GetRevision(self, request: pb.GetRevisionRequest, context: Any) -> pb.Revision:
        """One revision."""
        deployment, revision = await self._deployments.get_revision(current_principal().organization, request.name)
        return messages.revision(revision, deployment.name, deployment.status)

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Any) -> pb.ListRevisionsResponse:
        """A page of revisions."""
        size, below = pages.page_size(request.page_size), pages.decode(request, int)
        deployment, found = await self._deployments.list_revisions(
            current_principal().organization, request.parent, below[0] if below else None, size + 1
        )
        token = pages.encode(request, found[size - 1].number) if len(found) > size else ""
        shown = [messages.revision(one, deployment.name, deployment.status) for one in found[:size]]
        return pb.ListRevisionsResponse(revisions=shown, next_page_token=token)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Any) -> pb.ListReplicasResponse:
        """The replicas that there are."""
        deployment, _ = await self._deployments.get(current_principal().organization, request.parent)
        shown = [
            messages.replica(replica, one)
            for one in self._reconciler.observed(deployment.uid)
            for replica in one.replicas
        ]
        shown.sort(key=lambda replica: (replica.service, replica.start_time.ToNanoseconds(), replica.replica))
        return pb.ListReplicasResponse(replicas=shown)

    async def ReadLogs(self, request: pb.ReadLogsRequest, context: Any) -> AsyncIterator[pb.LogLine]:
        """Lines that replicas printed."""
        deployment, latest = await self._deployments.get(current_principal().organization, request.name)
        if request.follow and request.previous:
            raise InvalidArgument(
                "What replicas printed before they were started last does not grow; leave out follow or previous.",
                reason="FIELDS_INVALID",
                violations=[("previous", "cannot be followed")],
            )
        services = {one.name for one in latest.bentos[domain.MAIN].parsed().services}
        services |= {one.service for one in self._reconciler.observed(deployment.uid)}
        if request.service and request.service not in services:
            domain.refuse([("service", f"{request.service!r} is none of {', '.join(sorted(services))}")])
        since = messages.since(request)
        lines = self._runtime.logs(
            deployment.uid,
            service=request.service,
            replica=request.replica,
            tail=request.tail_lines if request.HasField("tail_lines") else -1 if since else _LAST_LINES,
            since=since,
            follow=request.follow,
            previous=request.previous,
        )
        async with contextlib.aclosing(lines):  # type: ignore[type-var]
            async for line in lines:
                yield messages.line(line)


class EventsServicer(event_stubs.EventsServicer):
    """ekiben.deployer.v1.Events."""

    def __init__(self, deployments: Deployments, reconciler: Reconciler, runtime: Runtime) -> None:
        self._deployments, self._reconciler, self._runtime = deployments, reconciler, runtime

    async def ReadEvents(self, request: events_pb2.ReadEventsRequest, context: Any) -> AsyncIterator[events_pb2.Event]:
        """What the cluster wrote down."""
        deployment, _ = await self._deployments.get(current_principal().organization, request.name)
        self._reconciler.ownership.check()
        events = self._runtime.events(deployment.uid, follow=request.follow)
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield messages.event(event, deployment.name)


class InstanceTypesServicer(stubs.InstanceTypesServicer):
    """ekiben.deployer.v1.InstanceTypes."""

    def __init__(self, instance_types: list[domain.InstanceType], clusters: Clusters, settings: Settings) -> None:
        self._instance_types, self._clusters, self._settings = instance_types, clusters, settings

    async def ListInstanceTypes(
        self, request: pb.ListInstanceTypesRequest, context: Any
    ) -> pb.ListInstanceTypesResponse:
        """All instance types."""
        if request.cluster:
            await self._clusters.get(request.cluster)
        return pb.ListInstanceTypesResponse(
            instance_types=[messages.instance_type(one) for one in self._instance_types]
        )

    async def GetCluster(self, request: pb.GetClusterRequest, context: Any) -> pb.Cluster:
        """One cluster."""
        found = await self._clusters.get(request.name)
        return _cluster(found, self._settings, self._clusters.detail(found))

    async def ListClusters(self, request: pb.ListClustersRequest, context: Any) -> pb.ListClustersResponse:
        """All clusters."""
        found = await self._clusters.search()
        detail = self._clusters.detail
        return pb.ListClustersResponse(clusters=[_cluster(one, self._settings, detail(one)) for one in found])


class ClustersServicer(cluster_stubs.ClustersServicer):
    """ekiben.deployer.v1.Clusters."""

    def __init__(self, clusters: Clusters, settings: Settings) -> None:
        self._clusters, self._settings = clusters, settings

    async def CreateCluster(self, request: clusters_pb2.CreateClusterRequest, context: Any) -> pb.Cluster:
        """Another cluster."""
        return _cluster(await self._clusters.create(request.cluster), self._settings)

    async def UpdateCluster(self, request: clusters_pb2.UpdateClusterRequest, context: Any) -> pb.Cluster:
        """A changed cluster."""
        mask = request.update_mask if request.HasField("update_mask") else None
        return _cluster(await self._clusters.update(request.cluster, mask), self._settings)

    async def DeleteCluster(self, request: clusters_pb2.DeleteClusterRequest, context: Any) -> Empty:
        """One cluster less."""
        await self._clusters.delete(request.name)
        return Empty()

    async def CheckCluster(
        self, request: clusters_pb2.CheckClusterRequest, context: Any
    ) -> clusters_pb2.CheckClusterResponse:
        """How it is."""
        return await self._clusters.check(request.name)

    async def GetClusterRoles(
        self, request: clusters_pb2.GetClusterRolesRequest, context: Any
    ) -> clusters_pb2.GetClusterRolesResponse:
        """The rights that it needs."""
        manifests = await self._clusters.roles(request.name, request.service_account)
        return clusters_pb2.GetClusterRolesResponse(manifests=manifests)


class RoutesServicer(stubs.RoutesServicer):
    """ekiben.deployer.v1.Routes."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._routes = reconciler.routes

    async def WatchRoutes(self, request: pb.WatchRoutesRequest, context: Any) -> AsyncIterator[pb.RouteTable]:
        """The route table now and after each change."""
        if not request.gateway:
            raise InvalidArgument(
                "gateway is required.", reason="FIELDS_INVALID", violations=[("gateway", "is required")]
            )
        async with contextlib.aclosing(self._routes.watch(request.gateway)) as tables:  # type: ignore[type-var]
            async for table in tables:
                yield table

    async def AcknowledgeRoutes(self, request: pb.AcknowledgeRoutesRequest, context: Any) -> Empty:
        """A gateway routes by a version."""
        self._routes.acknowledge(request.gateway, request.version, request.refused_ports)
        return Empty()


def _position(deployment: Deployment) -> tuple[int, str]:
    return -round(deployment.create_time.timestamp() * 1e6), deployment.name


def _cluster(of: domain.Cluster, settings: Settings, detail: str = "") -> pb.Cluster:
    """The default one is what the settings say."""
    if of.name != domain.DEFAULT_CLUSTER:
        return messages.cluster(of, "kubernetes", detail)
    found = messages.cluster(of, settings.runtime)
    if settings.runtime == "kubernetes":
        found.namespaces.append(settings.kubernetes_namespace)
        found.pull_host, found.pull_secret = settings.kubernetes_pull_host, settings.kubernetes_pull_secret
        found.otlp_http_endpoint = settings.otlp_http_endpoint
        found.description = "The cluster of the deployer's settings."
    else:
        found.description = "This machine."
    return found
