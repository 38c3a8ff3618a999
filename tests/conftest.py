"""Fixtures that several parts of the suite use: databases and stores of both kinds, a clock that tests move."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from services.content import open_images
from services.content.images import ImageStore
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import open_registry
from services.kernel.clock import ManualClock
from tests import oci_registry as registries
from tests import parallel
from tests.postgres import PostgresServer, running_postgres
from tests.s3 import MISSING, S3Server, run_s3, versitygw

# How long one example takes says how busy the machine is, and nothing else.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> parallel.Scheduling:
    """Who runs which tests; see tests/parallel.py."""
    config.option.loadscopereorder = False
    return parallel.Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; those on Kubernetes may wait until its programs are built."""
    items[:] = parallel.ordered(items)
    for item in items:
        if item.path.parent.name == "kubernetes":
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL server of this session's own, on a Unix socket. Tests that hurt one start their own."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def _fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: SQLite waits for the disk at each commit, which no ordinary test needs."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ek-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        folder = request.getfixturevalue("_fast_folder")
        return f"sqlite:///{folder / 'test.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create(f"test_{os.urandom(6).hex()}")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server of this session's own, with credentials for it in the environment; see tests/s3.py."""
    if versitygw() is None:
        pytest.skip(MISSING)
    with run_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def oci_registry() -> Iterator[registries.OciRegistry]:
    """A real OCI registry of this session's own, without logins; see tests/oci_registry.py."""
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    with registries.run_registry() as registry:
        yield registry


@pytest.fixture(params=["files", "s3"])
def blobs_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store of blobs, once of each kind."""
    if request.param == "files":
        return f"file://{tmp_path}/blobs"
    server: S3Server = request.getfixturevalue("s3")
    return server.new_url()


@pytest.fixture(params=["layout", "registry"])
async def image_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ImageStore]:
    """An empty store of images, once of each kind."""
    if request.param == "layout":
        async with open_images(f"oci:{tmp_path}/layout") as (layout, _):
            yield layout
        return
    server: registries.OciRegistry = request.getfixturevalue("oci_registry")
    options = RegistryOptions(insecure=frozenset({server.host}))
    async with open_registry(f"{server.host}/{server.new_repository()}", options) as (registry, _):
        yield registry


@pytest.fixture
def manual_clock() -> ManualClock:
    """A clock that stands still until the test moves it."""
    return ManualClock()
