"""Bentos as people write them: what decorators and flags ask for is what runs, and what is wrong is said in words."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.platform import BentoMl, Platform, http, wait_for

# One lock for all of them, so that they share one environment.
HEAD = """import os, sys, bentoml
image = bentoml.images.Image(python_version="3.11", lock_python_packages=False)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder for a service.py."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def write(folder: Path, source: str) -> Path:
    """Make a project of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "service.py").write_text(HEAD + source)
    return folder


def call(platform: Platform, deployment: str, path: str, payload: object = None) -> Any:
    """POST to a deployment; the JSON or text that it answers."""
    (url,) = platform.ekiben_json("deployments", "get", deployment)["urls"]
    answer = http("POST", url + path, json.dumps(payload or {}).encode(), {"content-type": "application/json"})
    assert answer.status == 200, (answer.status, answer.body[:1000])
    return answer.json() if answer.headers["content-type"].startswith("application/json") else answer.body.decode()


def conditions(platform: Platform, deployment: str) -> dict[str, str]:
    """Messages by type."""
    found = platform.ekiben_json("deployments", "get", deployment)["conditions"]
    return {condition["type"]: condition.get("message", "") for condition in found}


def test_service_with_a_path_prefix_gets_ready(platform: Platform, bentoml: BentoMl, project: Path) -> None:
    write(
        project,
        """
@bentoml.service(image=image, path_prefix="/api/v9")
class Prefixed:
    @bentoml.api
    def echo(self, text: str = "x") -> str:
        return text
""",
    )
    bentoml("deploy", ".", "--name", "prefixed", "--timeout", "120", cwd=project)
    assert call(platform, "prefixed", "/api/v9/echo", {"text": "moved"}) == "moved"


def test_dependency_that_two_services_share_runs_once_with_its_own_variables(
    platform: Platform, bentoml: BentoMl, project: Path
) -> None:
    write(
        project,
        """
@bentoml.service(image=image, envs=[{"name": "SIZE", "value": "small"}])
class Base_1:
    @bentoml.api
    def look(self) -> dict:
        return {"pid": os.getpid(), "size": os.environ.get("SIZE")}

@bentoml.service
class Left:
    base = bentoml.depends(Base_1)
    @bentoml.api
    def look(self) -> dict:
        return self.base.look()

@bentoml.service
class Right:
    base = bentoml.depends(Base_1)
    @bentoml.api
    def look(self) -> dict:
        return self.base.look()

@bentoml.service(image=image, envs=[{"name": "SIZE", "value": "large"}])
class TOP:
    left = bentoml.depends(Left)
    right = bentoml.depends(Right)
    @bentoml.api
    def look(self) -> dict:
        return {"left": self.left.look(), "right": self.right.look(), "own": os.environ.get("SIZE")}
""",
    )
    bentoml("deploy", ".", "--name", "diamond", "--timeout", "150", cwd=project)
    seen = call(platform, "diamond", "/look")
    assert seen["left"]["pid"] == seen["right"]["pid"]
    counts = platform.ekiben_json("deployments", "get", "diamond")["replicaCounts"]
    assert {service: count["ready"] for service, count in counts.items()} == {
        "Base_1": 1,
        "Left": 1,
        "Right": 1,
        "TOP": 1,
    }


def test_canary_gets_its_share_its_replicas_and_comes_back_to_the_client(
    platform: Platform, bentoml: BentoMl, project: Path
) -> None:
    tags = []
    for version in ("one", "two"):
        write(
            project,
            f"""
@bentoml.service(image=image)
class Canary:
    @bentoml.api
    def version(self) -> str:
        return "{version}"
""",
        )
        built = re.search(r"(canary:[a-z0-9]{8,})", bentoml("build", ".", "-o", "tag", cwd=project).stdout)
        assert built
        tags.append(built[1])
    config = project / "config.yaml"
    config.write_text(
        f"""
name: canary
bento: {tags[0]}
services: {{Canary: {{scaling: {{min_replicas: 1, max_replicas: 1}}}}}}
canary:
  route_type: random
  versions:
    next: {{bento: "{tags[1]}", weight: 40, services: {{Canary: {{scaling: {{min_replicas: 2, max_replicas: 2}}}}}}}}
"""
    )
    bentoml("push", tags[1])
    bentoml("deployment", "create", "-f", str(config), "--timeout", "150")
    seen = Counter(call(platform, "canary", "/version") for _ in range(1))
    (url,) = platform.ekiben_json("deployments", "get", "canary")["urls"]
    seen += Counter(
        http("POST", f"{url}/version", b"{}", {"content-type": "application/json"}).body.decode() for _ in range(400)
    )
    # Five standard deviations of 400 draws at 40 %: one run in a million is outside.
    assert 0.27 < seen["two"] / seen.total() < 0.53, seen
    replicas = platform.ekiben("deployments", "logs", "canary", "--tail", "500").stdout
    assert len(set(re.findall(r"canary-[0-9a-f]{8}", replicas))) == 3, "one of main, two of the canary"
    bentoml("deployment", "update", "canary", "--env", "X=1")
    kept = json.loads(bentoml("deployment", "get", "canary", "-o", "json").stdout)["config"]["canary"]["versions"][
        "next"
    ]
    assert (kept["weight"], kept["services"]["Canary"]["scaling"]["min_replicas"]) == (40, 2)
    shown = platform.ekiben("deployments", "get", "canary").stdout
    assert f"next  {tags[1]}  40 %" in shown


def test_what_is_wrong_is_said_once_and_not_to_callers(platform: Platform, bentoml: BentoMl, project: Path) -> None:
    write(
        project,
        """
@bentoml.service(image=image)
class Leaver:
    def __init__(self):
        print("the secret of the house", flush=True)
        os._exit(0)
    @bentoml.api
    def echo(self) -> str:
        return ""
""",
    )
    assert bentoml("deploy", ".", "--name", "leaver", "--timeout", "120", cwd=project, check=False).returncode == 1
    said = conditions(platform, "leaver")
    assert [kind for kind, message in said.items() if "the secret of the house" in message] == ["Available"]
    (url,) = platform.ekiben_json("deployments", "get", "leaver")["urls"]

    def refused() -> bool:
        answer = http("POST", f"{url}/echo", b"{}", {"content-type": "application/json"})
        assert answer.status == 503
        assert "the secret of the house" not in answer.body.decode()
        return "exited with" in answer.json()["detail"]

    wait_for("the reason in the answer", refused, 20)


def test_requirement_that_cannot_be_read_is_named_once(platform: Platform, bentoml: BentoMl, project: Path) -> None:
    write(
        project,
        """
image = image.python_packages("tabulate=>4")
@bentoml.service(image=image)
class Misspelled:
    @bentoml.api
    def echo(self) -> str:
        return ""
""",
    )
    done = bentoml("deploy", ".", "--name", "misspelled", "--timeout", "120", cwd=project, check=False)
    assert done.returncode == 1 and "tabulate=>4" in done.stdout + done.stderr
    assert [kind for kind, message in conditions(platform, "misspelled").items() if "tabulate=>4" in message] == [
        "Built"
    ]
    platform.ekiben("deployments", "delete", "misspelled", "--yes")
