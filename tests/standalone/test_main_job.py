"""The main job: an unmodified `bentoml` pushes, deploys and is served, and every hop is seen."""

import functools
import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.platform import BentoMl, Platform, http, process_tree_of, wait_for
from tests.standalone.load import Load


def build(bentoml: BentoMl, folder: Path) -> str:
    """Build a bento with the real command; its tag."""
    done = bentoml("build", ".", "-o", "tag", cwd=folder)
    tag = re.search(r"([a-z0-9_-]+:[a-z0-9]{8,})", done.stdout)
    assert tag, done.stdout
    return tag.group(1).removeprefix("__tag__:")


def post(url: str, path: str, payload: object, headers: Mapping[str, str] | None = None) -> Any:
    """POST JSON and give back the answer's JSON or text."""
    answer = http(
        "POST", url + path, json.dumps(payload).encode(), {"content-type": "application/json", **(headers or {})}
    )
    assert answer.status == 200, (answer.status, answer.body[:2000])
    try:
        return answer.json()
    except ValueError:
        return answer.body.decode()


def url_of(platform: Platform, deployment: str) -> str:
    """The one URL that a deployment reports."""
    urls = platform.ekiben_json("deployments", "get", deployment)["urls"]
    assert len(urls) == 1, urls
    return str(urls[0])


def predictions_of(platform: Platform, *filters: str) -> list[dict[str, Any]]:
    """The prediction log, newest first."""
    found: list[dict[str, Any]] = platform.ekiben_json("predictions", "list", *filters)
    return found


@pytest.fixture(scope="module")
def everything(platform: Platform, bentoml: BentoMl, bentos: Path) -> str:
    """The URL of the deployment `everything`, deployed by the real command."""
    bentoml("deploy", ".", "--name", "everything", cwd=bentos / "everything", timeout_s=400)
    return url_of(platform, "everything")


def test_deploy_waits_until_the_deployment_answers(platform: Platform, everything: str) -> None:
    assert post(everything, "/echo", {"text": "hello"}) == "hello"
    got = platform.ekiben_json("deployments", "get", "everything")
    assert got["state"] == "RUNNING"
    assert got["replicaCounts"]["Everything"]["ready"] == 1


def test_a_deployment_is_reached_by_host_name_too(platform: Platform, everything: str) -> None:
    answer = http(
        "POST",
        f"{platform.url}/echo",
        b'{"text": "by host"}',
        {"host": f"everything-default.localhost:{platform.port}", "content-type": "application/json"},
    )
    assert (answer.status, answer.body) == (200, b"by host")


def test_a_streaming_response_arrives_chunk_by_chunk(everything: str) -> None:
    curl = subprocess.Popen(
        [
            "curl",
            "-sN",
            "-X",
            "POST",
            f"{everything}/stream",
            "-H",
            "content-type: application/json",
            "-d",
            '{"count": 4}',
        ],
        stdout=subprocess.PIPE,
    )
    assert curl.stdout is not None
    arrivals = [time.monotonic() for _ in curl.stdout]
    assert len(arrivals) == 4
    assert arrivals[-1] - arrivals[0] > 0.3, "the chunks came in one piece"
    assert curl.wait(10) == 0


def test_a_task_is_submitted_followed_and_fetched(everything: str) -> None:
    task = post(everything, "/slow/submit", {"seconds": 0.2})
    wait_for(
        "the task",
        lambda: http("GET", f"{everything}/slow/status?task_id={task['task_id']}").json()["status"] == "completed",
    )
    assert http("GET", f"{everything}/slow/get?task_id={task['task_id']}").body == b"slept 0.2"


def test_files_go_up_and_down_and_arrays_pass(everything: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    (tmp_path / "in.bin").write_bytes(data)
    up = subprocess.run(
        ["curl", "-sf", "-F", f"file=@{tmp_path / 'in.bin'}", f"{everything}/upload"], capture_output=True, check=True
    )
    assert json.loads(up.stdout) == {"size": len(data), "sum": sum(data) % 65536}
    down = http("POST", f"{everything}/download", b'{"size": 70000}', {"content-type": "application/json"})
    assert down.body == bytes(i % 256 for i in range(70000))
    assert post(everything, "/double", {"array": [[1.0, 2.0], [3.0, 4.0]]}) == [[2.0, 4.0], [6.0, 8.0]]


def test_a_prediction_is_captured_traced_and_monitored(platform: Platform, everything: str) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    post(
        everything,
        "/info",
        {"payload": {"a": 1, "b": 2}},
        {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "authorization": "Bearer not-to-be-kept"},
    )
    began = time.monotonic()
    (row,) = wait_for("the prediction", lambda: predictions_of(platform, "--trace", trace), 10)
    assert time.monotonic() - began < 4, (
        "a prediction must be readable within two seconds (and the command's own start)"
    )
    shown = platform.ekiben_json("predictions", "show", row["name"].removeprefix("predictions/"))
    assert shown["deployment"] == "deployments/everything"
    assert shown["revision"] == "deployments/everything/revisions/1"
    assert shown["status"] == 200
    assert json.loads(shown["request"]["text"]) == {"payload": {"a": 1, "b": 2}}
    assert json.loads(shown["response"]["text"]) == {"keys": ["a", "b"], "count": 2}
    assert shown["bento"].startswith("bentoRepositories/everything/bentos/")
    assert "not-to-be-kept" not in json.dumps(shown)
    assert shown["replica"]

    def monitored() -> bool:
        (row,) = predictions_of(platform, "--trace", trace)
        shown = platform.ekiben_json("predictions", "show", row["name"].removeprefix("predictions/"))
        return any(json.loads(entry["data"]).get("keys") == 2 for entry in shown.get("monitorEntries", []))

    wait_for("the monitored value", monitored, 60)

    def spans() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = platform.ekiben_json("traces", "show", trace)["spans"]
        return found if {span["service"] for span in found} >= {"gateway", "Everything"} else []

    found = wait_for("the replica's spans in the trace", spans, 15)
    by_id = {span["spanId"]: span for span in found}
    assert any(
        span["service"] == "Everything" and by_id.get(span.get("parentSpanId", ""), {}).get("service") == "gateway"
        for span in found
    ), "the replica's span hangs below Envoy's"
    waterfall = platform.ekiben("traces", "show", trace).stdout
    assert "gateway" in waterfall and "Everything" in waterfall


@pytest.mark.parametrize("sized", [True, False], ids=["content length", "chunked"])
def test_requests_after_a_large_one_keep_traces_of_their_own(
    platform: Platform, everything: str, tmp_path: Path, sized: bool
) -> None:
    (tmp_path / "in.bin").write_bytes(bytes(1 << 20))
    connections, upload = 4, ["curl", "-sf", "-F", f"file=@{tmp_path / 'in.bin'}", f"{everything}/upload"]
    upload[1:1] = [] if sized else ["-H", "transfer-encoding: chunked"]
    uploads = [subprocess.Popen(upload, stdout=subprocess.PIPE) for _ in range(connections)]
    assert [json.loads(each.communicate(timeout=60)[0])["size"] for each in uploads] == [1 << 20] * connections
    traces = [secrets.token_hex(16) for _ in range(connections)]
    for trace in traces:
        post(everything, "/echo", {"text": "after"}, {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})

    def joined(trace: str) -> bool:
        return "Everything" in {span["service"] for span in platform.ekiben_json("traces", "show", trace)["spans"]}

    for trace in traces:
        wait_for("the replica's spans", functools.partial(joined, trace), 30)


def test_a_failing_prediction_is_captured_with_its_status(platform: Platform, everything: str) -> None:
    answer = http("POST", f"{everything}/fail", b"{}", {"content-type": "application/json"})
    assert answer.status == 500
    wait_for(
        "the failed prediction",
        lambda: predictions_of(platform, "--deployment", "everything", "--status", "5xx"),
        10,
    )


def test_metrics_hold_the_replicas_own(platform: Platform, everything: str) -> None:
    text = http("GET", f"{platform.url}/metrics").body.decode()
    counts = [line for line in text.splitlines() if line.startswith("bentoml_service_request_total")]
    ours = [line for line in counts if 'deployment="everything"' in line]
    assert ours and all('revision="1"' in line and 'replica="' in line for line in ours), counts
    assert "grpc_server_handled_total" in text and "envoy_" in text
    if shutil.which("promtool"):
        lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        found = [line for line in (lint.stdout + lint.stderr).splitlines() if not line.startswith("bentoml_")]
        assert not found, found


def test_two_services_answer_across_depends_in_separate_processes(
    platform: Platform, bentoml: BentoMl, bentos: Path
) -> None:
    bentoml("deploy", ".", "--name", "chain", cwd=bentos / "chain", timeout_s=400)
    url = url_of(platform, "chain")
    trace = "5bf92f3577b34da6a3ce929d0e0e4736"
    traced = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert post(url, "/describe", {"text": "a b c"}, traced) == {"words": 3, "letters": 5}
    pids = post(url, "/pids", {})
    assert pids["own"] != pids["words"]
    counts = platform.ekiben_json("deployments", "get", "chain")["replicaCounts"]
    assert {name: count["ready"] for name, count in counts.items()} == {"Chain": 1, "Words": 1}

    def services() -> bool:
        return {"gateway", "Chain", "Words"} <= {
            span["service"] for span in platform.ekiben_json("traces", "show", trace)["spans"]
        }

    wait_for("one trace across depends", services, 15)


def test_no_dependency_listens_on_tcp(platform: Platform, bentoml: BentoMl, bentos: Path) -> None:
    counts = platform.ekiben_json("deployments", "get", "chain")["replicaCounts"]
    assert counts["Words"]["ready"] == 1
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    pickled = b"\x80\x04."
    ours = set(process_tree_of(str(platform.data)))
    ports = {
        int(port)
        for line in listening.splitlines()
        for port in re.findall(r"(?:127\.0\.0\.1|0\.0\.0\.0|\*|\[::\]):(\d+)\s", line)
        if ours & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
    }
    assert platform.port in ports
    for port in ports:
        try:
            answer = http(
                "POST",
                f"http://127.0.0.1:{port}/count",
                pickled,
                {"content-type": "application/vnd.bentoml+pickle"},
                timeout_s=5,
            )
        except OSError:
            continue
        assert answer.status in (400, 401, 403, 404, 405, 415, 503, 411, 426, 501), (port, answer)


def test_a_model_of_the_model_store_is_served(platform: Platform, bentoml: BentoMl, bentos: Path) -> None:
    made = bentoml_python(bentoml, bentos / "modelled" / "make_model.py", "3")
    assert made.startswith("weights:")
    bentoml("deploy", ".", "--name", "modelled", cwd=bentos / "modelled", timeout_s=400)
    assert post(url_of(platform, "modelled"), "/predict", {"x": 2}) == 6.0
    (model,) = [m for m in platform.ekiben_json("models", "list") if "/weights/" in m["name"]]
    assert model["content"]["state"] == "READY"
    (row,) = wait_for("the prediction", lambda: predictions_of(platform, "--deployment", "modelled"), 10)
    assert row["models"] == [model["name"]]


def bentoml_python(bentoml: BentoMl, script: Path, *arguments: str) -> str:
    """Run a script with the client's Python; its output."""
    done = subprocess.run(
        [bentoml.bin / "python", script, *arguments], env=bentoml.env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_service_that_cannot_start_says_why(platform: Platform, bentoml: BentoMl, bentos: Path) -> None:
    done = bentoml(
        "deploy", ".", "--name", "crashing", "--timeout", "240", cwd=bentos / "crashing", check=False, timeout_s=400
    )
    assert done.returncode == 1, done.stdout + done.stderr
    got = platform.ekiben_json("deployments", "get", "crashing")
    assert got["state"] == "FAILED"
    assert "the weights are missing" in json.dumps(got["conditions"])
    refused = http("POST", f"{got['urls'][0]}/predict", b"{}", {"content-type": "application/json"})
    assert refused.status == 503
    assert refused.headers["content-type"].startswith("application/problem+json")
    assert refused.json()["reason"] == "DEPLOYMENT_NOT_READY"
    platform.ekiben("deployments", "delete", "crashing", "--yes")


def test_an_update_under_load_fails_no_request_and_can_be_rolled_back(
    platform: Platform, bentoml: BentoMl, bentos: Path, tmp_path: Path
) -> None:
    project = tmp_path / "versions"
    shutil.copytree(bentos / "versions", project)
    bentoml("deploy", ".", "--name", "versions", cwd=project, timeout_s=400)
    url = url_of(platform, "versions")
    source = project / "service.py"
    source.write_text(source.read_text().replace('VERSION = "1"', 'VERSION = "2"'))
    with Load(url, "/version") as load:
        wait_for("answers of version 1", lambda: load.answers.get("1", 0) > 20)
        bentoml("deployment", "update", "versions", "--bento", ".", cwd=project, timeout_s=400)
        wait_for("answers of version 2", lambda: load.answers.get("2", 0) > 20, 120)
        platform.ekiben("deployments", "rollback", "versions", timeout_s=180)
        before = load.answers["1"]
        wait_for("answers of version 1 again", lambda: load.answers["1"] > before + 20, 60)
    assert load.failures == []
    revisions = platform.ekiben_json("deployments", "revisions", "versions")
    assert [revision["name"].rpartition("/")[2] for revision in revisions] == ["3", "2", "1"]
    assert revisions[0]["template"]["bento"] == revisions[2]["template"]["bento"]


def test_scaling_up_and_down_under_load_fails_no_request(platform: Platform) -> None:
    url = url_of(platform, "versions")
    with Load(url, "/version") as load:
        platform.ekiben("deployments", "scale", "versions", "2", timeout_s=120)
        wait_for(
            "two ready replicas",
            lambda: platform.ekiben_json("deployments", "get", "versions")["replicaCounts"]["Versions"]["ready"] == 2,
            60,
        )
        platform.ekiben("deployments", "scale", "versions", "1", timeout_s=120)
        wait_for(
            "one replica",
            lambda: platform.ekiben_json("deployments", "get", "versions")["replicaCounts"]["Versions"]["total"] == 1,
            60,
        )
    assert load.failures == []


def test_the_client_token_never_reaches_a_replica(platform: Platform, everything: str) -> None:
    trace = "6bf92f3577b34da6a3ce929d0e0e4736"
    post(
        everything,
        "/echo",
        {"text": "x"},
        {
            "X-YATAI-API-TOKEN": platform.token,
            "authorization": f"Bearer {platform.token}",
            "traceparent": f"00-{trace}-00f067aa0ba902b7-01",
        },
    )
    (row,) = wait_for("the prediction", lambda: predictions_of(platform, "--trace", trace), 10)
    assert platform.token not in json.dumps(platform.ekiben_json("predictions", "show", row["name"]))


def test_bentoml_lists_gets_terminates_and_deletes(platform: Platform, bentoml: BentoMl) -> None:
    assert "everything" in bentoml("deployment", "list").stdout
    assert "everything" in bentoml("deployment", "get", "everything").stdout
    bentoml("deployment", "terminate", "chain", "--wait", timeout_s=120)
    assert platform.ekiben_json("deployments", "get", "chain")["state"] == "TERMINATED"
    bentoml("deployment", "delete", "chain")
    wait_for(
        "the deployment to be gone",
        lambda: "chain" not in [d["name"].rpartition("/")[2] for d in platform.ekiben_json("deployments", "list")],
    )
