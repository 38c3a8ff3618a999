"""Versions of the route table where they cannot be kept, and acknowledgements of another deployer's."""

import asyncio

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import ResourceExhausted
from services.deployer.routes import Routes
from services.kernel.clock import ManualClock


class Versions:
    """What keeps versions: a disk that may be full."""

    def __init__(self) -> None:
        self.kept, self.full = 0, False

    async def next(self, after: int) -> int:
        if self.full:
            raise ResourceExhausted("The disk is full.", reason="DISK_FULL")
        self.kept = max(self.kept, after) + 1
        return self.kept


def table(*replicas: str) -> list[pb.Route]:
    endpoints = [pb.Endpoint(replica=replica) for replica in replicas]
    return [pb.Route(deployment="deployments/one", targets=[pb.Target(endpoints=endpoints)])]


async def test_routes_are_published_on_a_full_disk_and_versions_only_grow(manual_clock: ManualClock) -> None:
    versions, seen = Versions(), []
    routes = Routes(versions.next, manual_clock, lambda: None)
    for full in (False, True, True, False, True, False):
        versions.full = full
        await routes.publish(table(f"replica-{len(seen)}"))
        seen.append(routes.current().version)
    assert seen == sorted(set(seen))


async def test_an_acknowledgement_of_a_former_deployers_table_counts_for_nothing(manual_clock: ManualClock) -> None:
    routes = Routes(Versions().next, manual_clock, lambda: None)
    watch = routes.watch("gateway")
    await routes.publish(table("old"))
    async with asyncio.timeout(5):
        await anext(watch)
    routes.acknowledge("gateway", 1_800_000_000_000_000)
    await routes.publish(table("new"))
    assert not routes.routed("new")
    assert not routes.unrouted("old")
    routes.acknowledge("gateway", routes.current().version)
    assert routes.routed("new")
    assert routes.unrouted("old")
    await watch.aclose()  # type: ignore[attr-defined]
