"""Where replicas run, and the sizes they may have."""

from collections.abc import Sequence

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.deployer.v1 import clusters_pb2
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.clusters_pb2_grpc import ClustersStub
from ekiben.deployer.v1.deployer_pb2_grpc import InstanceTypesStub


class Clusters:
    """Clusters and their instance types."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = InstanceTypesStub(channel)
        self._clusters = ClustersStub(channel)

    async def get(self, name: str) -> pb.Cluster:
        """One cluster."""
        return await self._stub.GetCluster(pb.GetClusterRequest(name=name))

    async def list(self) -> Sequence[pb.Cluster]:
        """All clusters; there are never many."""
        return (await self._stub.ListClusters(pb.ListClustersRequest())).clusters

    async def create(self, cluster: pb.Cluster) -> pb.Cluster:
        """Add a Kubernetes cluster; `cluster.kubeconfig` holds its credentials."""
        return await self._clusters.CreateCluster(clusters_pb2.CreateClusterRequest(cluster=cluster))

    async def update(self, cluster: pb.Cluster, paths: Sequence[str]) -> pb.Cluster:
        """Change these fields of a cluster."""
        request = clusters_pb2.UpdateClusterRequest(cluster=cluster, update_mask=FieldMask(paths=paths))
        return await self._clusters.UpdateCluster(request)

    async def delete(self, name: str) -> None:
        """Remove a cluster in which there are no deployments."""
        await self._clusters.DeleteCluster(clusters_pb2.DeleteClusterRequest(name=name))

    async def check(self, name: str) -> clusters_pb2.CheckClusterResponse:
        """Whether it answers, and what its credentials do not allow."""
        return await self._clusters.CheckCluster(clusters_pb2.CheckClusterRequest(name=name))

    async def roles(self, name: str, *, service_account: str = "") -> str:
        """YAML of the rights that it needs; `service_account` is `NAMESPACE/NAME`."""
        request = clusters_pb2.GetClusterRolesRequest(name=name, service_account=service_account)
        return (await self._clusters.GetClusterRoles(request)).manifests

    async def instance_types(self, *, cluster: str = "") -> Sequence[pb.InstanceType]:
        """All instance types, in the order of the settings."""
        request = pb.ListInstanceTypesRequest(cluster=cluster)
        return (await self._stub.ListInstanceTypes(request)).instance_types
