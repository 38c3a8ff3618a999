"""Aliases as people use them: the command, the unmodified `bentoml`, HTTP/JSON and deployments."""

from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.platform import BentoMl, Platform

MODEL = "modelRepositories/aliased/models/{}"


@pytest.fixture(scope="module")
def aliased(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A platform with three versions of a model, of which v1 is in production."""
    for version in ("v1", "v2", "v3"):
        folder = tmp_path_factory.mktemp(version)
        (folder / "model.yaml").write_text(
            f"name: aliased\nversion: {version}\nmodule: ''\napi_version: v1\nlabels: {{}}\noptions: {{}}\nmetadata: {{}}\n"
            "context: {framework_name: '', framework_versions: {}, bentoml_version: 1.4.39, python_version: 3.11.7}\n"
            "signatures: {}\ncreation_time: '2026-01-02T03:04:05+00:00'\n"
        )
        (folder / "weights").write_text(version)
        platform.ekiben("models", "push", str(folder))
    platform.ekiben("aliases", "set", "models", "aliased:production", "v1", "--expect-none", "--reason", "first")
    return platform


def test_the_command_moves_an_alias_and_tells_its_history(aliased: Platform, tmp_path: Path) -> None:
    moment = datetime.now(UTC)
    aliased.ekiben("aliases", "set", "models", "aliased:production", "v2", "--expect", "v1", "--reason", "better")
    lost = aliased.ekiben("alias", "set", "models", "aliased:production", "v3", "--expect", "v1", check=False)
    assert lost.returncode == 1 and "names 'v2' now, not 'v1'" in lost.stderr
    assert aliased.ekiben_json("models", "get", "aliased:production")["name"] == MODEL.format("v2")
    then = aliased.ekiben_json("aliases", "get", "models", "aliased:production", "--at", moment.isoformat())
    assert (then["version"], then["reason"]) == (MODEL.format("v1"), "first")
    history = aliased.ekiben("aliases", "history", "models", "aliased:production").stdout.splitlines()
    assert [line.split()[3:] for line in history[1:]] == [
        ["v1", "v2", "admin", "better"],
        ["-", "v1", "admin", "first"],
    ]
    assert "production" in aliased.ekiben("models", "list", "aliased").stdout
    refused = aliased.ekiben("models", "delete", "aliased:v2", "--yes", check=False)
    assert refused.returncode == 1 and "is what production means" in refused.stderr
    by_alias = aliased.ekiben("models", "delete", "aliased:production", "--yes", check=False)
    assert by_alias.returncode == 1 and "Name the model itself" in by_alias.stderr
    into = tmp_path / "pulled"
    aliased.ekiben("models", "pull", "aliased:production", "--to", str(into))
    assert (into / "weights").read_text() == "v2"


def test_bentoml_pulls_by_an_alias_and_never_writes_to_one(aliased: Platform, bentoml: BentoMl, tmp_path: Path) -> None:
    aliased.ekiben("aliases", "set", "models", "aliased:candidate", "v3")
    bentoml("models", "pull", "aliased:candidate")
    listed = bentoml("models", "list", "aliased", "-o", "json").stdout
    assert "aliased:v3" in listed and "candidate" not in listed
    # A version that somebody called like the alias is not pushed into what the alias means.
    store = Path(bentoml.env["BENTOML_HOME"]) / "models" / "aliased"
    text = (store / "v3" / "model.yaml").read_text().replace("version: v3", "version: candidate")
    (store / "candidate").mkdir()
    (store / "candidate" / "model.yaml").write_text(text)
    before = aliased.ekiben_json("models", "get", "aliased:v3")
    pushed = bentoml("models", "push", "aliased:candidate", "--force", check=False)
    assert "Name the model itself" in pushed.stdout + pushed.stderr
    assert aliased.ekiben_json("models", "get", "aliased:v3") == before
    ours = aliased.ekiben("models", "push", str(store / "candidate"), "--force", check=False)
    assert ours.returncode == 1 and "is an alias" in ours.stderr


def test_http_has_the_same_aliases(aliased: Platform) -> None:
    alias = "/v1/modelRepositories/aliased/aliases/http"
    assert aliased.api("GET", alias).status == 404
    body = {"version": MODEL.format("latest"), "expectedVersion": "", "reason": "over HTTP"}
    made = aliased.api("POST", f"{alias}:set", body)
    assert made.status == 200 and made.json()["version"] == MODEL.format("v3")
    again = aliased.api("POST", f"{alias}:set", body)
    assert (again.status, again.json()["reason"]) == (409, "ALIAS_MOVED")
    assert aliased.api("GET", "/v1/modelRepositories/aliased/models/http").json()["aliases"].count("http") == 1
    assert aliased.api("GET", f"{alias}?time={quote(made.json()['updateTime'])}").json() == made.json()
    assert aliased.api("GET", f"{alias}?time=2020-01-01T00:00:00Z").status == 404
    assert aliased.api("DELETE", f"{alias}?expectedVersion={MODEL.format('v1')}").status == 409
    assert aliased.api("DELETE", f"{alias}?reason=done").status == 200
    changes = aliased.api("GET", f"{alias}/changes").json()["changes"]
    assert [(one.get("toVersion", ""), one["reason"]) for one in changes] == [
        ("", "done"),
        (MODEL.format("v3"), "over HTTP"),
    ]


def test_a_deployment_keeps_the_bento_that_the_alias_meant(
    aliased: Platform, bentoml: BentoMl, bentos: Path, tmp_path: Path
) -> None:
    built = bentoml("build", str(bentos / "versions"), "--name", "aliased", "--version", "b1", "-o", "tag").stdout
    bentoml("push", built.strip().removeprefix("__tag__:"))
    aliased.ekiben("aliases", "set", "bentos", "aliased:stable", "b1")
    wanted = {"name": "deployments/aliased", "template": {"bento": "bentoRepositories/aliased/bentos/stable"}}
    answer = aliased.api("POST", "/v1/deployments?validateOnly=true", wanted)
    assert answer.json()["template"]["bento"] == "bentoRepositories/aliased/bentos/b1"
