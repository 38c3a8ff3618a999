"""Killed in the middle of something, or robbed of files, and started again: nothing is lost, refused or left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures_faults import (
    JSON,
    answers,
    everything_of,
    kill_everything,
    predict,
    processes,
    recorded,
    replicas,
    state,
)
from tests.platform import BIN, Platform, http, wait_for
from tests.standalone.load import Load

pytestmark = pytest.mark.timeout(300)


def run_dir(platform: Platform) -> Path:
    """Where the platform's sockets are: below its data, or elsewhere where that is deep."""
    (envoy,) = processes(platform, "--disable-hot-restart")
    shim = int(Path(f"/proc/{envoy}/stat").read_text().rpartition(")")[2].split()[1])
    for line in Path("/proc/net/unix").read_text().splitlines():
        if line.endswith("/g/processes/envoy.sock"):
            folder = Path(line.split()[-1]).parents[2]
            if json.loads((folder / "g/processes/envoy.json").read_text())["shim"] == shim:
                return folder
    raise AssertionError("no socket of Envoy's shim")


def whole(platform: Platform, url: str) -> None:
    """Wait until the deployment is as if nothing had happened."""
    wait_for("predictions", lambda: answers(url), 60)
    wait_for("the state", lambda: state(platform, "versions") == "RUNNING", 60)
    wait_for("one replica", lambda: len(replicas(platform, "versions")) == 1, 60)


def revision(platform: Platform, which: str) -> int:
    return int(platform.ekiben_json("deployments", "get", "versions")[which].rpartition("/")[2])


@pytest.mark.parametrize("moment", ["at once", "the new one runs", "the old one drains"])
def test_killed_in_an_update_under_load_it_ends_the_update_and_fails_no_request(
    platform: Platform, deployed: str, moment: str
) -> None:
    whole(platform, deployed)
    latest = revision(platform, "latestRevision")
    moments: dict[str, Callable[[], bool]] = {
        "at once": lambda: True,
        "the new one runs": lambda: len(replicas(platform, "versions")) == 2,
        "the old one drains": lambda: (
            any(one["state"] == "DRAINING" for one in replicas(platform, "versions"))
            or revision(platform, "servingRevision") > latest
        ),
    }
    with Load(deployed, "/version", interval_s=0.02) as load:
        wait_for("requests", lambda: load.count > 10)
        platform.ekiben("deployments", "update", "versions", "--env", f"MOMENT={moment}", "--no-wait")
        wait_for(moment, moments[moment], 60)
        platform.kill()
        platform.start()
        wait_for("the new revision", lambda: revision(platform, "servingRevision") == latest + 1, 60)
        whole(platform, deployed)
    assert load.failures == []
    assert replicas(platform, "versions")[0]["revision"].endswith(f"/{latest + 1}")


def test_killed_again_while_it_starts_it_starts(platform: Platform, deployed: str) -> None:
    whole(platform, deployed)
    with Load(deployed, "/version", interval_s=0.05) as load:
        for _ in range(3):
            platform.kill()
            command = [BIN / "ekiben", "up", "--data", platform.data, "--port", str(platform.port)]
            starting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            holder = platform.data / "lock"
            wait_for("the start", lambda s=starting, h=holder: h.read_text() == str(s.pid), 20)
            starting.kill()
            starting.wait()
        platform.start()
        whole(platform, deployed)
    assert load.failures == []


def test_a_machine_that_lost_its_power_brings_everything_back(platform: Platform, deployed: str) -> None:
    whole(platform, deployed)
    trace, sockets = predict(deployed), run_dir(platform)
    captures = platform.data / "gateway" / "captures"

    def written() -> bool:
        return any(trace in file.read_text() for file in captures.glob("*.jsonl")) or recorded(platform, trace)

    wait_for("the capture to be written", written, 10)
    kill_everything(platform)
    shutil.rmtree(sockets)  # as /tmp is empty after a boot
    platform.start()
    whole(platform, deployed)
    wait_for("the prediction", lambda: recorded(platform, trace), 20)


def test_a_lost_run_directory_leaves_no_second_life(platform: Platform, deployed: str) -> None:
    whole(platform, deployed)
    before, sockets = set(everything_of(platform)), run_dir(platform)
    platform.kill()
    shutil.rmtree(sockets)
    platform.start()
    whole(platform, deployed)
    assert not before & set(everything_of(platform))


def test_torn_files_are_made_anew(platform: Platform, deployed: str) -> None:
    whole(platform, deployed)
    platform.kill()
    gateway = platform.data / "gateway"
    for file in (gateway / "envoy" / "listeners.json", gateway / "envoy" / "clusters.json"):
        file.write_text(file.read_text()[:200])
    (gateway / "routes.pb").write_bytes(b"\xff\xff\x01")
    (gateway / "captures" / "position.json").write_text("[1,")
    for file in (platform.data / "deployer" / "replicas").glob("*/replica.json"):
        file.write_text("{")
    platform.start()
    whole(platform, deployed)
    trace = predict(deployed)
    wait_for("captures", lambda: recorded(platform, trace), 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_in_an_update_it_ends_soon_and_goes_on_later(
    platform: Platform, deployed: str, number: signal.Signals
) -> None:
    whole(platform, deployed)
    latest = revision(platform, "latestRevision")
    platform.ekiben("deployments", "update", "versions", "--env", f"SIGNAL={number}", "--no-wait")
    wait_for("the new replica", lambda: len(replicas(platform, "versions")) == 2, 60)
    assert platform.process is not None
    os.kill(platform.process.pid, number)
    assert platform.process.wait(25) == 0
    assert everything_of(platform) == {}
    platform.start()
    wait_for("the new revision", lambda: revision(platform, "servingRevision") == latest + 1, 60)
    whole(platform, deployed)


def test_a_port_that_somebody_took_meanwhile_is_had_again_once_it_is_free(platform: Platform, deployed: str) -> None:
    whole(platform, deployed)
    assert platform.stop() == 0
    with socket.create_server(("127.0.0.1", int(deployed.rpartition(":")[2]))):
        platform.start()
        host = JSON | {"host": f"versions-default.localhost:{platform.port}"}
        wait_for(
            "predictions by host name",
            lambda: http("POST", f"{platform.url}/version", b"{}", host).status == 200,
            60,
        )
    whole(platform, deployed)
