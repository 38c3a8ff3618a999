"""From a model to the answers that it gave and back; what is in use stays, and what was deleted comes back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.platform import BentoMl, Platform, http, run, wait_for


@pytest.fixture
def tags(platform: Platform, bentoml: BentoMl, bentos: Path, tmp_path: Path) -> dict[str, str]:
    """A deployment `traced` of a bento with a model, both of names of their own; the tags of the two."""
    project = tmp_path / "traced"
    shutil.copytree(bentos / "modelled", project)
    for path in (path for path in project.iterdir() if path.is_file()):
        path.write_text(
            path.read_text().replace("weights:latest", "traced-weights:latest").replace("Modelled", "Traced")
        )
    script = (project / "make_model.py").read_text().replace('create("weights"', 'create("traced-weights"')
    (project / "make_model.py").write_text(script)
    made = run([str(bentoml.bin / "python"), "make_model.py", "2"], env=bentoml.env, cwd=project)
    built = bentoml("build", ".", "--output", "tag", cwd=project)
    bento = built.stdout.strip().splitlines()[-1].removeprefix("__tag__:")
    bentoml("deploy", bento, "--name", "traced", "--timeout", "240", timeout_s=400)
    return {"model": made.stdout.strip().splitlines()[-1], "bento": bento}


def names(graph: Any) -> list[str]:
    return [node["name"] for node in graph["nodes"]]


def refused(platform: Platform, *arguments: str) -> str:
    done = platform.ekiben(*arguments, check=False)
    assert done.returncode == 1, done.stdout
    return done.stderr


def test_from_a_model_to_its_predictions_and_back(platform: Platform, tags: dict[str, str]) -> None:
    (url,) = platform.ekiben_json("deployments", "get", "traced")["urls"]
    answer = http("POST", f"{url}/predict", json.dumps({"x": 2}).encode(), {"content-type": "application/json"})
    assert answer.json() == 4.0
    model, bento = (tags[kind].split(":") for kind in ("model", "bento"))
    wanted = {
        f"modelRepositories/{model[0]}/models/{model[1]}",
        f"bentoRepositories/{bento[0]}/bentos/{bento[1]}",
        "deployments/traced/revisions/1",
    }
    build = platform.ekiben_json("deployments", "get", "traced")["build"]
    listing = ("predictions", "list", "--revision", "traced/1")
    (prediction,) = wait_for("the prediction", lambda: platform.ekiben_json(*listing), 15)

    def told() -> bool:
        return build in names(platform.ekiben_json("lineage", "traced"))

    wait_for("the build of the revision", told, 15)
    made = [use for use in platform.ekiben_json("lineage", "traced")["uses"] if use["resource"] == build]
    assert {use["digest"] for use in made} == {platform.ekiben_json("builds", "get", build)["environment"]["digest"]}
    for start in (tags["model"], tags["bento"], "traced", prediction["name"]):
        found = platform.ekiben_json("lineage", start, "--live")
        assert wanted <= set(names(found)), start
    assert names(found)[0] == prediction["name"]
    over_http = platform.api("GET", "/v1/lineage?name=deployments/traced/revisions/1").json()
    assert over_http["name"] == "deployments/traced/revisions/1"
    shown = platform.ekiben("lineage", tags["model"]).stdout
    assert f"model {tags['model']}\n  used by\n" in shown
    assert "deployment traced, revision 1" in shown

    # What is in use stays, and the error says by what.
    assert f"is used by bentoRepositories/{bento[0]}" in refused(platform, "models", "delete", tags["model"], "--yes")
    used_by = refused(platform, "bentos", "delete", tags["bento"], "--yes")
    assert "is used by deployments/traced/revisions/1" in used_by

    # Once the deployment is gone all of it can go, and come back.
    platform.ekiben("deployments", "delete", "traced", "--yes")
    platform.ekiben("bentos", "delete", tags["bento"], "--yes")
    platform.ekiben("models", "delete", tags["model"], "--yes")
    deleted = platform.ekiben_json("models", "list", model[0], "--deleted")
    assert [one["resource"] for one in deleted] == [f"modelRepositories/{model[0]}/models/{model[1]}"]
    planned = platform.ekiben_json("admin", "gc", "--dry-run")
    assert not {"BLOB", "DELETED_VERSION"} & {one["kind"] for one in planned if model[0] in json.dumps(one)}
    platform.ekiben("models", "restore", tags["model"])
    platform.ekiben("bentos", "restore", tags["bento"])
    platform.ekiben("deployments", "create", tags["bento"], "--name", "traced", "--timeout", "120s")
    (url,) = platform.ekiben_json("deployments", "get", "traced")["urls"]
    answer = http("POST", f"{url}/predict", json.dumps({"x": 3}).encode(), {"content-type": "application/json"})
    assert answer.json() == 6.0

    # The former deployment of this name is history, told apart from the one that is there.
    uses = platform.ekiben_json("lineage", tags["model"])["uses"]
    revisions = [use for use in uses if use["consumer"] == "deployments/traced/revisions/1"]
    assert {use.get("live", False) for use in revisions} == {True, False}
    platform.ekiben("deployments", "delete", "traced", "--yes")
