"""The README's tour with everything elsewhere: rows in PostgreSQL, archives on S3; and an outage of both in its middle."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bentoml_clients import client
from tests.fixtures_faults import BENTOS, answers, predict, recorded, state
from tests.platform import BentoMl, Platform, http, running, wait_for
from tests.postgres import PostgresServer, running_postgres
from tests.s3 import S3Server
from tests.standalone.test_tour import run_tour

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that is stopped on the way."""
    with running_postgres() as started:
        yield started


@pytest.fixture(scope="module")
def elsewhere(server: PostgresServer, s3: S3Server) -> dict[str, str]:
    """What tells `ekiben up` where its rows and archives are."""
    return {"EKIBEN_DATABASE_URL": server.create("ekiben"), "EKIBEN_BLOBS_URL": s3.new_url(), **s3.environment}


def test_the_tour_of_the_readme_runs_on_postgresql_and_s3(
    tmp_path: Path, elsewhere: dict[str, str], server: PostgresServer, s3: S3Server
) -> None:
    run_tour(tmp_path, elsewhere)
    assert not list((tmp_path / "ekiben" / "data").rglob("*.db")), "no row is in a file"
    assert not list((tmp_path / "ekiben" / "data" / "registry" / "blobs").glob("*")), "no archive is in the folder"
    assert int(server.psql("SELECT count(*) FROM ekiben_recorder.predictions", "ekiben")) > 0


def test_an_outage_of_postgresql_stops_no_prediction_and_loses_none(
    tmp_path: Path, elsewhere: dict[str, str], server: PostgresServer
) -> None:
    env = elsewhere | {"EKIBEN_DATABASE_URL": server.create("outage")}
    with running(tmp_path / "data", env=env) as platform:
        bentoml = BentoMl(client("1.4"), tmp_path / "client").login(platform)
        bentoml("deploy", ".", "--name", "versions", cwd=BENTOS / "versions", timeout_s=400)
        url = str(platform.ekiben_json("deployments", "get", "versions")["urls"][0])
        server.stop()
        wait_for("it says so", lambda: http("GET", f"{platform.url}/readyz").status == 503, 30)
        refused = platform.ekiben("models", "list", check=False)
        assert refused.returncode == 1
        assert "database does not answer" in refused.stderr
        meanwhile = [predict(url) for _ in range(20)]
        server.start()
        wait_for("it is ready again", lambda: http("GET", f"{platform.url}/readyz").status == 200, 60)
        for trace in (meanwhile[0], meanwhile[-1]):
            wait_for("the prediction is recorded", lambda: recorded(platform, trace), 30)
        assert state(platform, "versions") == "RUNNING"
        assert _replicas(platform) == 1
        platform.ekiben("deployments", "scale", "versions", "2")
        wait_for("it scales", lambda: _replicas(platform) == 2 and answers(url), 60)


def _replicas(platform: Platform) -> int:
    counts = platform.ekiben_json("deployments", "get", "versions")["replicaCounts"]
    return int(counts["Versions"]["ready"])
