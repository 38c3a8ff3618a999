"""The suite as five processes over TCP with mutual TLS, on one PostgreSQL where it is installed: the same main job."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bentoml_clients import client
from tests.certificates import certificates
from tests.image_content import put_image
from tests.platform import BentoMl, Platform, free_port, http, process_tree_of, wait_for
from tests.postgres import running_postgres

BENTOS = Path(__file__).resolve().parent.parent / "bentos"
SERVICES = ("registry", "recorder", "builder", "deployer", "gateway")


class Suite(Platform):
    """Five processes on one machine; what a Platform's commands need, started another way."""

    def __init__(self, data: Path, database: str = "") -> None:
        super().__init__(data)
        self.database = database
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        names = ("registry", "builder", "deployer", "recorder", "blobs", "images", "otlp")
        self.ports = {name: free_port() for name in names}
        data.mkdir()
        certificates(data)
        (data / "service-token").write_text("eks_test-token-of-the-suite")
        (data / "service-token").chmod(0o600)

    def settings(self, service: str) -> dict[str, str]:
        """The environment of one service: what docs/settings.md tells an operator to set."""
        address = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        tls = {"TLS_CERT_FILE": "cert.pem", "TLS_KEY_FILE": "key.pem"}
        env = {
            "EKIBEN_SERVER_SERVICE_TOKEN_FILE": f"{self.data}/service-token",
            "EKIBEN_SERVER_LISTEN": address.get(service, "127.0.0.1:0"),
            "EKIBEN_SERVER_TLS_CLIENT_CA_FILE": f"{self.data}/ca.pem",
            "EKIBEN_SERVER_METRICS_LISTEN": "127.0.0.1:0",
            "EKIBEN_SERVER_OTLP_ENDPOINT": address["recorder"],
            "EKIBEN_SERVER_OTLP_CA_FILE": f"{self.data}/ca.pem",
            "EKIBEN_PEERS_SERVICE_TOKEN_FILE": f"{self.data}/service-token",
            "EKIBEN_PEERS_TLS_CA_FILE": f"{self.data}/ca.pem",
            "EKIBEN_PEERS_BLOBS": f"http://{address['blobs']}",
            "EKIBEN_PEERS_IMAGES": f"http://{address['images']}",
            **{f"EKIBEN_SERVER_{key}": f"{self.data}/{file}" for key, file in tls.items()},
            **{f"EKIBEN_PEERS_{key}": f"{self.data}/{file}" for key, file in tls.items()},
            **{
                f"EKIBEN_PEERS_{name.upper()}": address[name]
                for name in ("registry", "builder", "deployer", "recorder")
            },
        }
        own = {
            "registry": {
                "BLOBS_URL": f"file://{self.data}/blobs",
                "BLOBS_LISTEN": address["blobs"],
                "SECRETS_KEY_FILE": f"{self.data}/secrets.key",
                "ADMIN_TOKEN_FILE": f"{self.data}/admin-token",
            },
            "builder": {
                "DATA_DIR": f"{self.data}/builder",
                "RUN_DIR": f"{self.data}/b",
                "IMAGES_LISTEN": address["images"],
            },
            "deployer": {
                "DATA_DIR": f"{self.data}/deployer",
                "RUN_DIR": f"{self.data}/d",
                "PUBLIC_URL": self.url,
                "OTLP_HTTP_ENDPOINT": f"http://{address['otlp']}",
                "OTLP_TOKEN_FILE": f"{self.data}/otlp-token",
            },
            "recorder": {"OTLP_HTTP_LISTEN": address["otlp"], "OTLP_TOKEN_FILE": f"{self.data}/otlp-token"},
            "gateway": {"DATA_DIR": f"{self.data}/gateway", "RUN_DIR": f"{self.data}/g", "PORT": str(self.port)},
        }[service]
        if service != "gateway":
            one = f"{self.database}&schema=ekiben_{service}" if self.database else ""
            own["DATABASE_URL"] = one or f"sqlite+aiosqlite:///{self.data}/{service}.db"
        return env | {f"EKIBEN_{service.upper()}_{key}": value for key, value in own.items()}

    def start_service(self, service: str) -> None:
        """Run one service as an operator would."""
        with (self.data / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                [sys.executable, "-m", f"services.{service}"],
                env=os.environ | self.settings(service),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.data,
            )

    def start(self, timeout_s: float = 60.0) -> "Suite":
        for service in SERVICES:
            self.start_service(service)
        wait_for("the suite", lambda: http("GET", f"{self.url}/readyz", timeout_s=5).status == 200, timeout_s)
        return self

    def kill_service(self, service: str) -> None:
        """SIGKILL of one service."""
        self.processes[service].kill()
        self.processes[service].wait()

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
        for pid in process_tree_of(str(self.data)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """One PostgreSQL for all of them; empty, for a SQLite file each, where it is not installed."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(running_postgres())
        except pytest.skip.Exception:
            yield ""
        else:
            yield server.create("suite")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Suite]:
    """Five processes, ready."""
    opened = Suite(tmp_path_factory.mktemp("five") / "s", database)
    try:
        yield opened.start()
    except BaseException:
        for log in opened.data.glob("*.log"):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        opened.close()


@pytest.fixture(scope="module")
def deployed(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The main job over five processes; the deployment's URL."""
    bentoml = BentoMl(client("1.4"), tmp_path_factory.mktemp("client")).login(suite)
    bentoml("deploy", ".", "--name", "versions", cwd=BENTOS / "versions", timeout_s=400)
    return str(suite.ekiben_json("deployments", "get", "versions")["urls"][0])


def predict(url: str, trace: str) -> bool:
    """One prediction in a trace; whether it was answered."""
    headers = {"content-type": "application/json", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    return http("POST", f"{url}/version", b"{}", headers, timeout_s=10).status == 200


def recorded(suite: Suite, trace: str) -> None:
    """Wait until the prediction of a trace is in the log, once."""
    rows = wait_for("the prediction", lambda: suite.ekiben_json("predictions", "list", "--trace", trace), 20)
    assert len(rows) == 1, json.dumps(rows)


def test_the_main_job_runs_over_mutual_tls(suite: Suite, deployed: str) -> None:
    assert predict(deployed, "a" * 32)
    recorded(suite, "a" * 32)


def test_images_are_served_by_the_builders_process(suite: Suite) -> None:
    asyncio.run(put_image(suite.data / "builder" / "images", "default/five:v1"))
    token = base64.b64encode(f"anybody:{suite.token}".encode()).decode()
    path = f"{suite.url}/v2/default/five/manifests/v1"
    assert http("GET", path, headers={"authorization": f"Basic {token}"}).status == 200
    assert http("GET", path).status == 401


def test_a_peer_without_certificate_is_not_let_in(suite: Suite, deployed: str) -> None:
    import grpc

    roots = (suite.data / "ca.pem").read_bytes()
    with (
        grpc.secure_channel(f"127.0.0.1:{suite.ports['registry']}", grpc.ssl_channel_credentials(roots)) as channel,
        pytest.raises(grpc.FutureTimeoutError),
    ):
        grpc.channel_ready_future(channel).result(timeout=3)


@pytest.mark.parametrize("service", ["recorder", "registry", "builder", "deployer", "gateway"])
def test_each_service_killed_comes_back_and_loses_nothing(suite: Suite, deployed: str, service: str) -> None:
    trace = f"{SERVICES.index(service):x}" * 31 + "b"
    before = suite.ekiben_json("bentos", "list")
    suite.kill_service(service)
    if service in ("recorder", "registry", "builder"):
        assert predict(deployed, trace), "predictions go on without it"
    suite.start_service(service)
    wait_for("the suite", lambda: http("GET", f"{suite.url}/readyz", timeout_s=5).status == 200, 60)
    wait_for("predictions", lambda: predict(deployed, trace[:-1] + "c"), 60)
    recorded(suite, trace[:-1] + "c")
    if service in ("recorder", "registry", "builder"):
        recorded(suite, trace)
    assert suite.ekiben_json("bentos", "list") == before
    assert suite.ekiben_json("deployments", "get", "versions")["replicaCounts"]["Versions"]["total"] == 1


def test_predictions_go_on_while_the_deployer_restarts(suite: Suite, deployed: str) -> None:
    suite.kill_service("deployer")
    assert predict(deployed, "d" * 32)
    suite.start_service("deployer")
    wait_for(
        "the deployer",
        lambda: suite.ekiben_json("deployments", "get", "versions")["state"] == "RUNNING",
        60,
    )
    assert predict(deployed, "e" * 32)


def test_it_ends_clean(suite: Suite, deployed: str) -> None:
    for process in suite.processes.values():
        process.send_signal(signal.SIGTERM)
    codes = {name: process.wait(60) for name, process in suite.processes.items()}
    assert set(codes.values()) == {0}, codes
    wait_for("no process left", lambda: not process_tree_of(str(suite.data)), 30)
