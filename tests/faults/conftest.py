"""One running platform for all tests here that hurt it; each leaves it whole."""

from collections.abc import Iterator

import pytest

from tests.bentoml_clients import client
from tests.fixtures_faults import BENTOS
from tests.platform import BentoMl, Platform, running


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform that these tests may hurt. Its replicas wait for a deployer as long as several starts take beside other
    tests."""
    env = {"EKIBEN_DEPLOYER_ORPHAN_GRACE_S": "90"}
    with running(tmp_path_factory.mktemp("faults") / "data", env=env) as up:
        yield up


@pytest.fixture(scope="session")
def bentoml(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> BentoMl:
    """The client, logged in."""
    return BentoMl(client("1.4"), tmp_path_factory.mktemp("client")).login(platform)


@pytest.fixture(scope="session")
def deployed(platform: Platform, bentoml: BentoMl) -> str:
    """A running deployment `versions`; its URL."""
    bentoml("deploy", ".", "--name", "versions", cwd=BENTOS / "versions", timeout_s=400)
    return str(platform.ekiben_json("deployments", "get", "versions")["urls"][0])
