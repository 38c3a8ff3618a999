"""One running platform for the tests of this folder; each test uses names of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bentoml_clients import client
from tests.platform import BentoMl, Platform, running


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """`ekiben up` on embedded defaults; environments are cached between runs where EKIBEN_TEST_CACHE says."""
    with running(tmp_path_factory.mktemp("platform") / "data") as up:
        yield up


@pytest.fixture(scope="session")
def bentoml(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> BentoMl:
    """The `bentoml` command 1.4, logged in."""
    return BentoMl(client("1.4"), tmp_path_factory.mktemp("client")).login(platform)


@pytest.fixture(scope="session")
def old_bentoml(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BentoMl]:
    """The `bentoml` command of Yatai's days, logged in, by version."""
    return {
        version: BentoMl(client(version), tmp_path_factory.mktemp(f"client-{version}")).login(platform)
        for version in ("1.1", "1.0")
    }


BENTOS = Path(__file__).resolve().parent.parent / "bentos"


@pytest.fixture(scope="session")
def bentos() -> Path:
    """The folder of the tests' own bentos."""
    assert os.access(BENTOS, os.R_OK)
    return BENTOS
