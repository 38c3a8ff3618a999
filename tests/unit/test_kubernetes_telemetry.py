"""What a pod is told of telemetry, and what its first program makes of it."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.deployer.runtimes.kubernetes import objects, telemetry
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.telemetry import PodTelemetry
from tests.kubernetes_sets import SPEC

PROGRAM = Path(telemetry.__file__).with_name("telling.py")


def container(where: Where, spec: Any = SPEC) -> dict[str, Any]:
    deployment = objects.objects(spec, 1, where, "uid")[-1]
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


def secret(where: Where) -> dict[str, Any]:
    found: dict[str, Any] = objects.objects(SPEC, 1, where, "uid")[0]["data"]
    return found


@pytest.mark.parametrize("endpoint", ["", "http://127.0.0.1:4318", "http://localhost:4318", "http://[::1]:4318"])
def test_pods_are_told_nothing_where_they_could_not_reach_it(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    where = Where("i", "n", telemetry=PodTelemetry(endpoint, tmp_path / "token"))
    assert container(where) == container(Where("i", "n")) and secret(where) == secret(Where("i", "n"))


def test_another_token_changes_the_secret_and_no_pod(tmp_path: Path) -> None:
    where = Where("i", "n", telemetry=PodTelemetry("http://recorder:4318", tmp_path / "token"))
    before = container(where)
    assert "otlp.token" not in secret(where)
    (tmp_path / "token").write_text("one\n")
    first = secret(where)["otlp.token"]
    (tmp_path / "token").write_text("the-new-token")
    assert secret(where)["otlp.token"] not in ("", first)
    assert container(where) == before and "the-new-token" not in json.dumps(before)


def prepared(told: Any, *, can: tuple[str, ...], **env: str) -> dict[str, str]:
    """The environment that the first program makes, in an image that has some exporters."""
    program = runpy.run_path(str(PROGRAM))
    found = {"EKIBEN_TELEMETRY": json.dumps(told), "EKIBEN_REPLICA": "pod-1", **env}
    names = {name: program[name] for name in can}
    program["prepare"].__globals__["there"] = lambda wanted: any(wanted is each for each in names.values())
    program["prepare"](found)
    return found


def told_to(spec: Any) -> Any:
    where = Where("i", "n", telemetry=PodTelemetry("http://recorder:4318/"))
    (value,) = [each["value"] for each in container(where, spec)["env"] if each["name"] == "EKIBEN_TELEMETRY"]
    return json.loads(value)


def test_what_the_image_can_send_is_sent_and_what_the_user_said_wins() -> None:
    own = {"services": {"Iris_Classifier": {"tracing": {"sample_rate": 0.5}, "workers": 2}}}
    env = prepared(
        told_to(SPEC),
        can=("TRACES", "MONITORS"),
        EKIBEN_OTLP_TOKEN="secret",
        BENTOML_CONFIG_OVERRIDES=json.dumps(own),
        OTEL_RESOURCE_ATTRIBUTES="team=ml",
    )
    config = json.loads(env["BENTOML_CONFIG_OVERRIDES"])["services"]["Iris_Classifier"]
    assert config["tracing"]["otlp"] == {"protocol": "http", "endpoint": "http://recorder:4318/v1/traces"}
    assert (config["tracing"]["sample_rate"], config["workers"]) == (0.5, 2)
    assert config["monitoring"]["options"] == {"protocol": "http", "endpoint": "http://recorder:4318/v1/logs"}
    assert env["OTEL_EXPORTER_OTLP_HEADERS"] == "authorization=Bearer%20secret"
    assert env["OTEL_EXPORTER_OTLP_TIMEOUT"] == "20"
    assert env["OTEL_RESOURCE_ATTRIBUTES"].startswith("team=ml,ekiben.deployment=deployments%2Firis,")
    assert env["OTEL_RESOURCE_ATTRIBUTES"].endswith(",ekiben.replica=pod-1")
    assert not {"EKIBEN_TELEMETRY", "EKIBEN_REPLICA", "EKIBEN_OTLP_TOKEN"} & env.keys()


@pytest.mark.parametrize(("can", "token"), [((), "secret"), (("TRACES", "MONITORS"), "")])
def test_an_image_without_exporters_and_a_pod_without_a_token_send_nothing(can: tuple[str, ...], token: str) -> None:
    env = prepared(told_to(SPEC), can=can, EKIBEN_OTLP_TOKEN=token)
    config = json.loads(env["BENTOML_CONFIG_OVERRIDES"])["services"]["Iris_Classifier"]
    assert config == {"monitoring": {"enabled": True, "type": "default", "options": {"log_path": "/tmp/ekiben"}}}


@pytest.mark.parametrize(
    ("schema", "known"), [("runner_connection: Schema", True), ("workers: int", False), ("", False)]
)
def test_calls_to_other_services_keep_their_connections_where_bentoml_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: str, known: bool
) -> None:
    if schema:
        (tmp_path / "_bentoml_sdk/service").mkdir(parents=True)
        (tmp_path / "_bentoml_sdk/__init__.py").touch()
        (tmp_path / "_bentoml_sdk/service/config.py").write_text(schema)
    monkeypatch.syspath_prepend(tmp_path)
    told = told_to(replace(SPEC, dependencies=(("Embedder", "key-of-it"), ("Ranker", "another"))))
    own = {"services": {"Ranker": {"runner_connection": {"max_requests": 7, "max_age": 9.0}}}}
    config = json.loads(prepared(told, can=(), BENTOML_CONFIG_OVERRIDES=json.dumps(own))["BENTOML_CONFIG_OVERRIDES"])
    kept = {"runner_connection": {"max_requests": 2**31 - 1}}
    assert config["services"].get("Embedder") == (kept if known else None)
    assert config["services"]["Ranker"] == own["services"]["Ranker"]


def test_a_bento_before_1_2_gets_a_configuration_file(tmp_path: Path) -> None:
    told = told_to(replace(SPEC, legacy=True, config={"api_server": {"workers": 1}})) | {"folder": str(tmp_path / "x")}
    env = prepared(told, can=("TRACES", "MONITORS"), EKIBEN_OTLP_TOKEN="secret")
    config = json.loads(Path(env["BENTOML_CONFIG"]).read_text())
    assert (config["version"], config["api_server"]) == (1, {"workers": 1})
    assert config["monitoring"] == {"enabled": True, "type": "otlp", "options": {}}
    assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://recorder:4318" and "BENTOML_CONFIG_OVERRIDES" not in env


def test_it_becomes_the_server(tmp_path: Path) -> None:
    told = told_to(SPEC) | {"folder": str(tmp_path)}
    command = [sys.executable, "-c", telemetry.TELLING, "env"]
    env = {"PATH": os.environ["PATH"], "EKIBEN_TELEMETRY": json.dumps(told)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert "BENTOML_CONFIG_OVERRIDES=" in done.stdout and "EKIBEN_TELEMETRY" not in done.stdout
