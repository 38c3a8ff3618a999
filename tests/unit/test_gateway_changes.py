"""What a changed route table costs a gateway: what has changed, and not what there is."""

from collections.abc import Sequence
from pathlib import Path

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.gateway.messages import Resource, Tables
from services.gateway.watcher import Watcher
from services.gateway.xds import Files
from services.kernel.clock import ManualClock

MANY = 50


class CountingFiles(Files):
    """Counts what is made into text."""

    written = 0

    def write(self, path: Path, resources: Sequence[Resource]) -> str:
        self.written += 1
        return super().write(path, resources)


def table(version: int, **addresses: str) -> pb.RouteTable:
    """Routes with one endpoint each, at another address where that is given by the deployment."""
    made = pb.RouteTable(version=version)
    for number in range(MANY):
        name = f"d{number}"
        endpoint = pb.Endpoint(replica=f"{name}-r", address=addresses.get(name, f"10.0.0.{number}:3000"))
        target = pb.Target(target="main", revision=f"deployments/{name}/revisions/1", endpoints=[endpoint], weight=100)
        made.routes.add(deployment=f"deployments/{name}", targets=[target])
    return made


def test_one_changed_route_among_many_writes_one_file_of_endpoints(tmp_path: Path) -> None:
    files, tables = CountingFiles(tmp_path / "envoy"), Tables()
    watcher = Watcher(None, None, [], files, None, None, ManualClock())  # type: ignore[arg-type]
    first = watcher._write_clusters(tables.read(table(1)))
    assert (files.written, len(first)) == (MANY + 1, MANY + 1)
    files.written = 0
    assert watcher._write_clusters(tables.read(table(2))) == first
    assert files.written == 0
    changed = watcher._write_clusters(tables.read(table(3, d7="10.1.1.1:3000")))
    assert files.written == 1
    differing = {name for name in first.keys() | changed.keys() if first.get(name) != changed.get(name)}
    assert differing == {"cluster.deployment_d7_main_1.version_text"}
    # What somebody deleted is written again with the next change.
    files.endpoints("deployment_d9_main_1").unlink()
    files.clusters.unlink()
    watcher._write_clusters(tables.read(table(4, d7="10.1.1.1:3000")))
    assert files.endpoints("deployment_d9_main_1").exists() and files.clusters.exists()


def test_a_route_that_goes_and_comes_back_is_written_again(tmp_path: Path) -> None:
    files, tables = CountingFiles(tmp_path / "envoy"), Tables()
    watcher = Watcher(None, None, [], files, None, None, ManualClock())  # type: ignore[arg-type]
    whole, less = table(1), table(2)
    del less.routes[3:]
    first = watcher._write_clusters(tables.read(whole))
    assert len(watcher._write_clusters(tables.read(less))) == 4
    assert watcher._write_clusters(tables.read(whole)) == first
