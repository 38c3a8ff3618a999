"""Where replicas run, and the sizes they may have."""

from collections.abc import Sequence

import grpc.aio

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.deployer_pb2_grpc import InstanceTypesStub


class Clusters:
    """Clusters and their instance types."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = InstanceTypesStub(channel)

    async def get(self, name: str) -> pb.Cluster:
        """One cluster."""
        return await self._stub.GetCluster(pb.GetClusterRequest(name=name))

    async def list(self) -> Sequence[pb.Cluster]:
        """All clusters; there are never many."""
        return (await self._stub.ListClusters(pb.ListClustersRequest())).clusters

    async def instance_types(self, *, cluster: str = "") -> Sequence[pb.InstanceType]:
        """All instance types, in the order of the settings."""
        request = pb.ListInstanceTypesRequest(cluster=cluster)
        return (await self._stub.ListInstanceTypes(request)).instance_types
