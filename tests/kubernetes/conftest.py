"""One cluster for the tests of this folder, a registry that its nodes pull from, and a platform whose replicas are there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bentoml_clients import client
from tests.cluster import Cluster, running_cluster
from tests.cluster_platform import new_namespace, platform_on
from tests.oci_registry import OciRegistry
from tests.platform import BentoMl, Platform


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


@pytest.fixture(scope="session")
def kubernetes_namespace(cluster: Cluster) -> Iterator[str]:
    """The namespace of `kubernetes_platform`."""
    with new_namespace(cluster, "platform") as name:
        yield name


@pytest.fixture(scope="session")
def kubernetes_platform(
    cluster: Cluster, kubernetes_namespace: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """One platform with default settings for all who need no others: tests give their deployments names of their own
    and delete them. Others make theirs by `platform_on`."""
    with platform_on(cluster, kubernetes_namespace, tmp_path_factory.mktemp("platform")) as up:
        yield up


@pytest.fixture(scope="session")
def kubernetes_bentoml(kubernetes_platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> BentoMl:
    """The `bentoml` command 1.4, logged in to `kubernetes_platform`."""
    return BentoMl(client("1.4"), tmp_path_factory.mktemp("client")).login(kubernetes_platform)
