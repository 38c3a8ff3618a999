"""SIGKILL of every part of a running platform: after it, everything ends in the right state and nothing is left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.fixtures_faults import BENTOS, answers, predict, processes, recorded, replicas, state
from tests.platform import BentoMl, Platform, http, process_tree_of, running, wait_for


def test_envoy_killed_is_back_and_routes_again(platform: Platform, deployed: str) -> None:
    victims = processes(platform, "envoy", "--disable-hot-restart") or processes(platform, "envoy")
    assert victims
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for("predictions after Envoy's death", lambda: answers(deployed), 20)
    assert http("GET", f"{platform.url}/readyz").status == 200


def test_a_killed_replica_is_replaced(platform: Platform, deployed: str) -> None:
    before = replicas(platform, "versions")
    victims = processes(platform, "start-http-server")
    assert victims
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(
        "a new run of the replica",
        lambda: (
            [r for r in replicas(platform, "versions") if r["state"] == "READY" and r != before[0]]
            and answers(deployed)
        ),
        60,
    )
    wait_for("the state", lambda: state(platform, "versions") == "RUNNING")
    assert len(replicas(platform, "versions")) == 1


def test_a_replica_that_hangs_is_restarted(platform: Platform, deployed: str) -> None:
    pids = processes(platform, "start-http-server") + processes(platform, "_bentoml_impl")
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_for("predictions again", lambda: answers(deployed), 120)
    wait_for("the state", lambda: state(platform, "versions") == "RUNNING")
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists(), "the stopped process was left behind"


def test_everything_killed_comes_back_whole_and_no_prediction_is_lost(platform: Platform, deployed: str) -> None:
    traces = [predict(deployed) for _ in range(20)]
    platform.kill()
    platform.start()
    wait_for("predictions after the restart", lambda: answers(deployed), 60)
    wait_for("the state", lambda: state(platform, "versions") == "RUNNING")
    assert len(replicas(platform, "versions")) == 1
    for trace in traces:
        wait_for("the prediction", lambda trace=trace: recorded(platform, trace), 20)


def test_killed_for_good_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path / "data") as up:
        up.kill()
        wait_for("no process of the platform", lambda: not process_tree_of(str(up.data)), 40)


def test_a_killed_platform_finishes_the_deploy_it_was_asked_for(platform: Platform, bentoml: BentoMl) -> None:
    bentoml("deploy", ".", "--name", "midway", "--no-wait", cwd=BENTOS / "chain", timeout_s=400)
    platform.kill()
    platform.start()
    wait_for("the deployment", lambda: state(platform, "midway") == "RUNNING", 180)
    assert len(replicas(platform, "midway")) == 2
    platform.ekiben("deployments", "delete", "midway", "--yes")


def test_a_push_cut_short_can_be_repeated(platform: Platform, bentoml: BentoMl, tmp_path: Path) -> None:
    script = (
        "import bentoml, os, sys\n"
        "with bentoml.models.create('big') as m:\n"
        "    open(os.path.join(m.path, 'w.bin'), 'wb').write(os.urandom(1 << 20) * 220)\n"
        "print(m.tag)\n"
    )
    tag = subprocess.run(
        [bentoml.bin / "python", "-c", script], env=bentoml.env, capture_output=True, text=True, check=True
    ).stdout.strip()
    failed = threading.Event()

    def push() -> None:
        if bentoml("models", "push", tag, check=False).returncode:
            failed.set()

    pusher = threading.Thread(target=push)
    pusher.start()
    uploads = platform.data / "registry"
    wait_for(
        "the first bytes of the push",
        lambda: any(p.stat().st_size > 1 << 20 for p in uploads.rglob("*") if p.is_file() and "upload" in str(p)),
        30,
    )
    platform.kill()
    pusher.join(120)
    platform.start()
    models = [m for m in platform.ekiben_json("models", "list") if "/big/" in m["name"]]
    assert all(m["content"]["state"] != "READY" for m in models), "a half content must not be visible"
    bentoml("models", "push", tag)
    (model,) = [m for m in platform.ekiben_json("models", "list") if "/big/" in m["name"]]
    assert model["content"]["state"] == "READY"


def test_ctrl_c_stops_everything_and_a_second_start_brings_it_back(platform: Platform, deployed: str) -> None:
    assert platform.stop() == 0
    wait_for("no process of the platform", lambda: not process_tree_of(str(platform.data)), 10)
    platform.start()
    wait_for("predictions", lambda: answers(deployed), 60)


def test_a_second_instance_on_the_same_data_is_refused(platform: Platform) -> None:
    second = Platform(platform.data)
    with pytest.raises(RuntimeError, match=r"in use"):
        second.start(20)
    assert http("GET", f"{platform.url}/readyz").status == 200


def test_a_port_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        up = Platform(tmp_path / "data", port=taken.getsockname()[1])
        try:
            with pytest.raises(RuntimeError, match=r"ended with 2:\n(.*\n)*.*in use"):
                up.start(20)
            assert "Traceback" not in up.output
        finally:
            up.close()
        assert not process_tree_of(str(up.data))
