"""Seeing in: what is wrong in words, the cluster's events, logs of the run before; what the client's pods say."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from ekiben.errors import PermissionDenied
from services.deployer.runtimes.kubernetes import api, terminal
from services.deployer.runtimes.sessions import ExecSpec
from services.kernel.clock import SYSTEM
from tests.cluster import Cluster
from tests.keyboard import Keyboard
from tests.platform import BIN, BentoMl, Platform, http, wait_for

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def moody(
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A deployment whose replica can be told to be unready, or to end."""
    name = f"moody-{os.urandom(2).hex()}"
    project = shutil.copytree(bentos / "moody", tmp_path_factory.mktemp("moody") / "moody")
    kubernetes_bentoml("deploy", ".", "-n", name, cwd=project, timeout_s=500)
    yield name
    kubernetes_platform.ekiben("deployments", "delete", name, "--yes", "--no-wait")


def described(platform: Platform, name: str) -> Any:
    return platform.ekiben_json("deployments", "get", name)


def conditions(platform: Platform, name: str) -> str:
    return " ".join(each.get("message", "") for each in described(platform, name)["conditions"])


def condition(platform: Platform, name: str, kind: str) -> Any:
    """One of its conditions; empty where it has none of this kind."""
    return next((each for each in described(platform, name)["conditions"] if each["type"] == kind), {})


def replicas(platform: Platform, name: str) -> list[Any]:
    found: list[Any] = platform.ekiben_json("deployments", "replicas", name)
    return found


def test_events_tell_what_the_cluster_did(kubernetes_platform: Platform, moody: str) -> None:
    lines = kubernetes_platform.ekiben("deployments", "events", moody, "-o", "json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    assert {"Scheduled", "Started"} <= {event["reason"] for event in events if event.get("replica") == replica}
    assert "ScalingReplicaSet" in {event["reason"] for event in events if event["object"].startswith("Deployment/")}
    times = [event["time"][:19] for event in events]
    assert times == sorted(times)


def test_the_log_of_the_run_before_is_kept_and_of_the_past_as_much_as_is_wanted(
    kubernetes_platform: Platform, moody: str, tmp_path: Path
) -> None:
    url = described(kubernetes_platform, moody)["urls"][0]
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    previous = ("deployments", "logs", moody, "--replica", replica, "--previous", "--tail", "-1")
    assert kubernetes_platform.ekiben(*previous).stdout == ""
    logs = ("deployments", "logs", moody, "--no-prefix")
    assert "Moody initialized" in kubernetes_platform.ekiben(*logs, "--since", "1h").stdout
    assert kubernetes_platform.ekiben(*logs, "--since", "2100-01-01").stdout == ""
    assert kubernetes_platform.ekiben(*logs, "--tail", "0").stdout == ""

    command, followed = [str(BIN / "ekiben"), *logs, "--tail", "0", "--follow"], tmp_path / "followed"
    with followed.open("wb") as out:
        following = subprocess.Popen(command, env=kubernetes_platform.client_env(), stdout=out)

    def comes() -> bool:
        http("GET", f"{url}/docs.json")
        return followed.stat().st_size > 0

    try:
        wait_for("a line of a request", comes, 60)
    finally:
        following.terminate()
        following.wait()
    assert "docs.json" in followed.read_text() and "initialized" not in followed.read_text()
    http("POST", f"{url}/leave", b"{}", JSON)

    def back() -> bool:
        (now,) = replicas(kubernetes_platform, moody)
        return bool(now["state"] == "READY" and now.get("restartCount"))

    wait_for("the container that is started again", back, 90)
    assert "I leave" in kubernetes_platform.ekiben(*previous).stdout
    unknown = kubernetes_platform.ekiben("deployments", "logs", moody, "--replica", "nobody", check=False)
    assert unknown.returncode == 1 and "There is no replica nobody" in unknown.stderr
    unknown = kubernetes_platform.ekiben("deployments", "logs", moody, "--service", "Nope", check=False)
    assert unknown.returncode == 1 and "'Nope' is none of Moody" in unknown.stderr
    refused = kubernetes_platform.ekiben("deployments", "logs", moody, "--previous", "--follow", check=False)
    assert "does not grow" in refused.stderr


def test_a_command_runs_in_a_pod_and_is_recorded(kubernetes_platform: Platform, moody: str) -> None:
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    exec_ = ("deployments", "exec", moody, "--replica", replica, "--")
    done = kubernetes_platform.ekiben(*exec_, "sh", "-c", "echo $BENTO_PATH; id -u; echo no >&2; exit 7", check=False)
    assert (done.returncode, done.stdout) == (7, "/home/bentoml/bento\n1034\n")
    assert "no" in done.stderr
    missing = kubernetes_platform.ekiben(*exec_, "no-such-program", check=False)
    assert missing.returncode not in (0, 7) and "no-such-program" in missing.stderr
    listed = kubernetes_platform.ekiben_json("deployments", "recordings", "list", moody)
    kept = next(each for each in listed if each.get("exitCode") == 7)
    id = kept["name"].rpartition("/")[2]
    assert "1034" in kubernetes_platform.ekiben("deployments", "recordings", "replay", moody, id).stdout
    cast = kubernetes_platform.ekiben("deployments", "recordings", "show", moody, id).stdout.splitlines()
    assert json.loads(cast[0])["version"] == 2
    audited = kubernetes_platform.ekiben_json("audit", "list", "--limit", "50")
    assert any(e["method"].endswith("CreateTerminal") and e["resource"] == kept["name"] for e in audited)


def test_a_terminal_is_one_with_its_size_and_its_keys(kubernetes_platform: Platform, moody: str) -> None:
    with Keyboard([str(BIN / "ekiben"), "deployments", "exec", moody, "-it"], kubernetes_platform) as keyboard:
        # A kubelet sets the size beside what it passes on of the keys: what is typed first may run first.
        wait = 'until [ "$(stty size)" = "{}" ]; do sleep 0.1; done; {}\n'
        keyboard.type(wait.format("30 100", "tty"))
        keyboard.until("/dev/pts/")
        keyboard.resize(132, 43)
        keyboard.type(wait.format("43 132", "exit 5"))
        assert keyboard.ended() == 5


def test_a_tty_without_input_ends_once_the_program_asks_for_it(kubernetes_platform: Platform, moody: str) -> None:
    """What takes the TTY over throws away the first Ctrl-D."""
    flush = "import sys, termios, time; time.sleep(0.5); termios.tcflush(0, termios.TCIFLUSH); sys.stdin.read()"
    done = kubernetes_platform.ekiben("deployments", "exec", moody, "-t", "--", "python", "-c", flush)
    assert done.returncode == 0


@pytest.mark.parametrize("how", [(), ("-it",)], ids=["pipes", "tty"])
def test_what_is_left_is_hung_up(kubernetes_platform: Platform, moody: str, how: tuple[str, ...]) -> None:
    mark = f"/tmp/left-{os.urandom(4).hex()}"
    exec_ = ("deployments", "exec", moody)
    command = ["sh", "-c", f"trap '' HUP; echo $$ > {mark}; sleep 3600; sleep 3600"]
    with Keyboard([str(BIN / "ekiben"), *exec_, *how, "--", *command], kubernetes_platform):
        wait_for("the command", lambda: kubernetes_platform.ekiben(*exec_, "--", "cat", mark).stdout.strip())
    gone = ["sh", "-c", f"! kill -0 $(cat {mark})"]
    wait_for("its end", lambda: not kubernetes_platform.ekiben(*exec_, "--", *gone, check=False).returncode, 60)


async def test_a_command_that_does_not_read_is_not_taken_for_lost(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform, moody: str, monkeypatch: Any
) -> None:
    """While it does not, the cluster answers no heartbeat."""
    monkeypatch.setattr(api, "_HEARTBEAT_S", 0.05)
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    go = f"/tmp/go-{os.urandom(4).hex()}"
    late = ExecSpec("", replica, ("sh", "-c", f"until [ -e {go} ]; do sleep 0.1; done; wc -c"), name="debug-late")
    pod = cluster.get("pod", replica, "-n", kubernetes_namespace)
    async with (
        api.open_api(cluster.kubeconfig, "", kubernetes_namespace) as client,
        terminal.run(client, late, lambda: pod, SYSTEM) as session,
    ):
        for _ in range(10):
            await session.send(b"x" * 50_000)
        await asyncio.to_thread(kubernetes_platform.ekiben, "deployments", "exec", moody, "--", "touch", go)
        await session.end_input()
        said = b"".join([data async for _, data in session.output()])
    assert (said, session.exit_code) == (b"500000\n", 0)


async def test_a_role_without_terminals_is_told_in_the_cluster_s_words(
    cluster: Cluster, kubernetes_namespace: str, tmp_path: Path
) -> None:
    name = f"nobody-{os.urandom(2).hex()}"
    cluster.kubectl("create", "serviceaccount", name, "-n", kubernetes_namespace)
    whole = yaml.safe_load(cluster.kubeconfig.read_text())
    whole["users"][0]["user"] = {"token": cluster.kubectl("create", "token", name, "-n", kubernetes_namespace).strip()}
    async with api.open_api(whole, "", kubernetes_namespace) as client:
        with pytest.raises(PermissionDenied, match=r'cannot get resource "pods/exec".*Give the deployer') as denied:
            async with client.connected("any", "exec", [("command", "id")]):
                raise AssertionError("it was let in")
    assert denied.value.reason == "KUBERNETES_DENIED"


def test_a_container_of_another_image_sees_the_replica_s_processes(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform, moody: str
) -> None:
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    image = cluster.get("pod", replica, "-n", kubernetes_namespace)["spec"]["containers"][0]["image"]
    debug = ("deployments", "debug", moody, "--image", image)
    code = "import os, sys; print([open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()])"
    done = kubernetes_platform.ekiben(*debug, "-i", "--", "python", "-c", f"{code}; sys.exit(9)", check=False)
    assert done.returncode == 9, done.stderr
    assert "start-http-server" in done.stdout
    lost = kubernetes_platform.ekiben(*debug[:-1], image.replace("sha256:", "sha256:0")[:-1], "--", "true", check=False)
    assert lost.returncode == 1 and "cannot be started beside the replica" in lost.stderr


async def test_the_client_s_websockets_show_pods_and_their_logs(kubernetes_platform: Platform, moody: str) -> None:
    (replica,) = [each["replica"] for each in replicas(kubernetes_platform, moody)]
    headers = {"X-YATAI-API-TOKEN": kubernetes_platform.token}
    async with aiohttp.ClientSession(base_url=kubernetes_platform.url, headers=headers) as session:
        async with session.ws_connect(f"/ws/v2/deployments/{moody}/pods?organization_name=default") as socket:
            (pod,) = (await socket.receive_json(timeout=20))["payload"]
        assert (pod["name"], pod["status"]["phase"]) == (f"{moody}.{replica}", "Running")
        async with session.ws_connect(f"/ws/v1/clusters/default/tail?pod_name={pod['name']}") as socket:
            wanted = {"id": "1", "container_name": "main", "follow": True, "tail_lines": 50}
            await socket.send_json({"type": "data", "payload": wanted})
            frame = await socket.receive_json(timeout=20)
        assert frame["type"] == "data" and base64.b64decode(frame["payload"]["items"][0])


def test_an_unready_replica_says_what_its_probe_was_answered(kubernetes_platform: Platform, moody: str) -> None:
    url = described(kubernetes_platform, moody)["urls"][0]
    assert http("POST", f"{url}/sulk", b"{}", JSON).status == 200
    wait_for("the answer of its probe", lambda: "probe with 503" in conditions(kubernetes_platform, moody), 90)
    assert [each["state"] for each in replicas(kubernetes_platform, moody)] == ["UNREADY"]
    warnings = kubernetes_platform.ekiben("deployments", "events", moody, "--warnings").stdout
    assert "Unhealthy" in warnings and "503" in warnings


def test_a_quota_that_is_used_up_is_a_condition(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform, moody: str
) -> None:
    metadata = {"name": "nothing-more", "namespace": kubernetes_namespace}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": {"pods": "0"}}}
    cluster.kubectl("apply", "-f", "-", input=json.dumps(quota))
    try:
        kubernetes_platform.ekiben("deployments", "scale", moody, "2", "--no-wait")
        wait_for("the quota", lambda: "quota is used up" in conditions(kubernetes_platform, moody), 60)
        applied = condition(kubernetes_platform, moody, "Applied")
        assert applied["reason"] == "QUOTA_EXCEEDED" and "exceeded quota: nothing-more" in applied["message"]
    finally:
        cluster.kubectl("delete", "resourcequota", "nothing-more", "-n", kubernetes_namespace)


def test_a_field_that_somebody_owns_is_a_condition_until_he_gives_it_up(
    cluster: Cluster, kubernetes_namespace: str, kubernetes_platform: Platform, moody: str
) -> None:
    at = ("-n", kubernetes_namespace)
    (service,) = cluster.get("services", *at, "-l", f"app.kubernetes.io/name={moody}")["items"]
    edit = '{"spec": {"ports": [{"name": "http", "port": 3000, "targetPort": 8080}]}}'
    cluster.kubectl("patch", "service", service["metadata"]["name"], *at, "--type=strategic", "-p", edit)

    def reason() -> str:
        return str(condition(kubernetes_platform, moody, "Applied").get("reason", ""))

    wait_for("the condition", lambda: reason() == "FIELD_OWNED", 60)
    assert "kubectl-patch" in condition(kubernetes_platform, moody, "Applied")["message"]
    cluster.kubectl("delete", "service", service["metadata"]["name"], *at)
    wait_for("nothing to be said", lambda: reason() == "", 60)
