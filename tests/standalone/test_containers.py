"""The main job with replicas that are containers."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.content.attestations import keys
from services.deployer.runtimes.podman import Podman
from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.fixtures_containers import need_podman, wipe
from tests.platform import BentoMl, Platform, http, process_tree_of, running, wait_for
from tests.standalone.load import Load

pytestmark = pytest.mark.timeout(900)

TRACE = "7bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def contained(tmp_path_factory: pytest.TempPathFactory, bentos: Path) -> Iterator[dict[str, Any]]:
    """A platform that runs containers, with one deployment of two services."""
    need_podman()
    folder = tmp_path_factory.mktemp("contained")
    trusted, key = folder / "trusted", keys.generate()
    trusted.mkdir()
    (trusted / "our.pub").write_bytes(keys.public_pem(key.public_key()))
    (folder / "our.key").write_bytes(keys.private_pem(key))
    env = {
        "EKIBEN_DEPLOYER_RUNTIME": "podman",
        # All of it with images that the builder signs: what is not signed is not run.
        "EKIBEN_BUILDER_SIGNING_KEY_FILE": str(folder / "our.key"),
        "EKIBEN_DEPLOYER_IMAGE_POLICY": "enforce",
        "EKIBEN_DEPLOYER_IMAGE_KEYS": str(trusted),
        "EKIBEN_BUILDER_BASES": base_image(),
        "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system",
        # A machine that is busy with other tests may need longer for the start of the platform than the 15 s by default.
        "EKIBEN_DEPLOYER_ORPHAN_GRACE_S": "90",
        "EKIBEN_GATEWAY_ORPHAN_GRACE_S": "90",
    }
    with running(folder / "data", env=env) as platform:
        bentoml = BentoMl(client("1.4"), folder / "client").login(platform)
        project = shutil.copytree(bentos / "contained", folder / "project")
        bentoml("deploy", ".", "--name", "contained", cwd=project, timeout_s=400)
        (url,) = platform.ekiben_json("deployments", "get", "contained")["urls"]
        yield {"platform": platform, "bentoml": bentoml, "project": project, "url": url, "trusted": trusted}
        platform.stop()
        wipe(engine(platform))


def engine(platform: Platform) -> Podman:
    """Podman as the platform has it."""
    run = platform.data / "run" / "d"
    if not run.exists():
        run = Path(f"/tmp/ekiben-{os.getuid()}-{hashlib.sha256(os.fsencode(platform.data)).hexdigest()[:12]}/d")
    return Podman(platform.data / "deployer", run)


def podman(platform: Platform, *words: str) -> str:
    """What podman says of the platform's containers."""
    own = engine(platform)
    return subprocess.run(own.command(*words), env=own.env, check=True, capture_output=True, text=True).stdout


def post(url: str, path: str, payload: object, **headers: str) -> Any:
    answer = http("POST", url + path, json.dumps(payload).encode(), {"content-type": "application/json", **headers})
    assert answer.status == 200, (answer.status, answer.body[:2000])
    try:
        return answer.json()
    except ValueError:
        return answer.body.decode()


def test_replicas_are_containers_that_may_do_little(contained: dict[str, Any]) -> None:
    platform, url = contained["platform"], contained["url"]
    about = post(url, "/about", {})
    assert about.pop("sockets").count(" ") == 0, "it sees the one service that it calls"
    assert int(about.pop("processes")) < 10
    assert int(about.pop("capabilities"), 16) == 0
    assert about == {
        "uid": "1034",
        **dict.fromkeys(("/etc", "/home/bentoml/bento", "/app/.venv"), "refused"),
        **dict.fromkeys(("/tmp", "~", "$BENTOML_HOME"), "writable"),
    }
    running = podman(platform, "ps", "--format", "{{.Names}}").split()
    replicas = platform.ekiben_json("deployments", "replicas", "contained")
    assert sorted(running) == sorted(replica["replica"] for replica in replicas)
    assert len(running) == 2
    assert (
        "Service Contained initialized" in platform.ekiben("deployments", "logs", "contained", "--tail", "1000").stdout
    )


def test_a_prediction_passes_both_and_is_captured_traced_and_monitored(contained: dict[str, Any]) -> None:
    platform, url = contained["platform"], contained["url"]
    answer = post(url, "/describe", {"text": "a b c"}, traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
    assert answer == {"words": 3, "letters": 5}
    (row,) = wait_for("the prediction", lambda: platform.ekiben_json("predictions", "list", "--trace", TRACE), 20)
    name = row["name"].removeprefix("predictions/")

    def monitored() -> bool:
        entries = platform.ekiben_json("predictions", "show", name).get("monitorEntries", [])
        return any(json.loads(entry["data"]).get("letters") == 5 for entry in entries)

    wait_for("the monitored value", monitored, 60)

    def services() -> bool:
        spans = platform.ekiben_json("traces", "show", TRACE)["spans"]
        return {"gateway", "Contained", "Words"} <= {span["service"] for span in spans}

    wait_for("one trace across both", services, 20)


def test_an_image_whose_signer_is_not_trusted_is_not_run_until_he_is(contained: dict[str, Any]) -> None:
    platform, key = contained["platform"], contained["trusted"] / "our.pub"
    template = platform.ekiben_json("deployments", "get", "contained")["template"]
    # The deployment runs already: what runs is not ended when a key is taken away.
    key.rename(key.with_suffix(".away"))
    try:
        bento = template["bento"].removeprefix("bentoRepositories/").replace("/bentos/", ":")
        platform.ekiben("deployments", "create", bento, "--name", "strange", "--no-wait")

        def condition() -> dict[str, Any]:
            found = platform.ekiben_json("deployments", "get", "strange")
            (verified,) = [each for each in found.get("conditions", []) if each["type"] == "Verified"] or [{}]
            return verified if found["state"] == "FAILED" else {}

        refused = wait_for("the refusal", condition, 60)
        assert refused["reason"] == "IMAGE_SIGNATURE_REFUSED" and "not by a trusted key" in refused["message"]
        assert not [name for name in podman(platform, "ps", "--format", "{{.Names}}").split() if "strange" in name]
        post(contained["url"], "/about", {})
    finally:
        key.with_suffix(".away").rename(key)
    wait_for("its start", lambda: platform.ekiben_json("deployments", "get", "strange")["state"] == "RUNNING", 120)
    (verified,) = [
        each
        for each in platform.ekiben_json("deployments", "get", "strange")["conditions"]
        if each["type"] == "Verified"
    ]
    assert verified["reason"] == "SIGNED" and "our.pub" in verified["message"]
    platform.ekiben("deployments", "delete", "strange", "--yes", timeout_s=120)


def test_update_under_load_rollback_and_a_killed_platform(contained: dict[str, Any]) -> None:
    platform, project, url = contained["platform"], contained["project"], contained["url"]
    source = project / "service.py"
    source.write_text(source.read_text().replace('VERSION = "1"', 'VERSION = "2"'))
    with Load(url, "/version") as load:
        wait_for("answers of version 1", lambda: load.answers.get("1", 0) > 20)
        contained["bentoml"]("deployment", "update", "contained", "--bento", ".", cwd=project, timeout_s=400)
        wait_for("answers of version 2", lambda: load.answers.get("2", 0) > 20, 120)
        platform.ekiben("deployments", "rollback", "contained", timeout_s=180)
        before = load.answers["1"]
        wait_for("answers of version 1 again", lambda: load.answers["1"] > before + 20, 120)

        def settled() -> bool:
            return len(podman(platform, "ps", "--format", "{{.Names}}").split()) == 2

        wait_for("two containers", settled, 60)
        names = sorted(podman(platform, "ps", "--format", "{{.Names}} {{.Pid}}").splitlines())
        platform.kill()
        platform.start()
        before = load.count
        wait_for("answers after the restart", lambda: load.count > before + 20, 60)
    assert load.failures == []
    wait_for("the state", lambda: platform.ekiben_json("deployments", "get", "contained")["state"] == "RUNNING")
    assert sorted(podman(platform, "ps", "--format", "{{.Names}} {{.Pid}}").splitlines()) == names, "not adopted"
    assert len(podman(platform, "images", "--quiet").split()) == 2, "each image was pulled once"


def test_a_killed_container_is_replaced_and_a_deleted_deployment_leaves_nothing(contained: dict[str, Any]) -> None:
    platform, url = contained["platform"], contained["url"]
    (pid,) = [
        line.split()[1]
        for line in podman(platform, "ps", "--format", "{{.Names}} {{.Pid}}").splitlines()
        if line.startswith("contained")
    ]
    os.kill(int(pid), signal.SIGKILL)
    wait_for("another container", lambda: podman(platform, "ps", "--format", "{{.Pid}}").split().count(pid) == 0, 30)
    wait_for(
        "answers", lambda: http("POST", url + "/version", b"{}", {"content-type": "application/json"}).status == 200, 60
    )
    platform.ekiben("deployments", "delete", "contained", "--yes", timeout_s=120)
    wait_for("no container", lambda: not podman(platform, "ps", "--all", "--quiet").split(), 60)
    assert platform.stop() == 0
    wait_for("no process", lambda: not process_tree_of(str(platform.data)), 20)
    platform.start()
