"""One cluster for the tests of this folder, and a registry that its nodes pull from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, running_cluster
from tests.oci_registry import OciRegistry


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Kubernetes of two nodes; see tests/cluster.py."""
    with running_cluster() as found:
        yield found


@pytest.fixture(scope="session")
def pull_host(cluster: Cluster, oci_registry: OciRegistry) -> Iterator[str]:
    """What nodes call the session's registry."""
    with cluster.serve_registry(oci_registry.host) as name:
        yield name


@pytest.fixture(scope="session")
def bentos() -> Path:
    """The folder of the tests' own bentos."""
    return Path(__file__).resolve().parent.parent / "bentos"
