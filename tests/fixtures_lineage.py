"""Uses of builds, as the deployer tells the registry of them."""

from ekiben.channel import open_channel
from ekiben.registry.v1 import lineage_pb2
from ekiben.registry.v1.lineage_pb2_grpc import LineageStub
from tests.fixtures_builder import Registry


async def use(registry: Registry, build: str) -> None:
    """Say that a deployment runs from a build, as the deployer does."""
    owner = lineage_pb2.UseOwner(organization="organizations/default", name="deployments/demo", uid="u1")
    consumer = "deployments/demo/revisions/1"
    live = lineage_pb2.Use(consumer=consumer, consumer_uid="r1", resource=build, live=True)
    token = (registry.folder / "service-token").read_text()
    async with open_channel(f"unix:{registry.run_dir}/registry", token=token) as channel:
        request = lineage_pb2.ReportUsesRequest(owner=owner, generation=1, uses=[live])
        await LineageStub(channel).ReportUses(request)
