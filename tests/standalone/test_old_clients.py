"""The `bentoml` command of Yatai's days, 1.1 and 1.0: login, push, pull; and what it built runs."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.platform import BentoMl, Platform, http


def build(bentoml: BentoMl, folder: Path) -> str:
    """Build a bento with an old client; its tag."""
    done = bentoml("build", ".", cwd=folder)
    tag = re.search(r'tag="?([a-z0-9_-]+:[a-z0-9]+)', done.stdout + done.stderr)
    assert tag, done.stdout + done.stderr
    return tag.group(1)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_what_an_old_client_pushes_is_deployed_and_pulled(
    platform: Platform, old_bentoml: dict[str, BentoMl], bentos: Path, version: str
) -> None:
    old = old_bentoml[version]
    tag = build(old, bentos / "legacy")
    pushed = old("push", tag)
    assert "Failed" not in pushed.stdout + pushed.stderr
    (bento,) = [b for b in platform.ekiben_json("bentos", "list") if b["name"].endswith("/" + tag.split(":")[1])]
    assert bento["content"]["state"] == "READY"
    assert bento["bentomlVersion"].startswith(version)

    name = f"legacy-{version.replace('.', '-')}"
    platform.ekiben("deployments", "create", tag, "--name", name, "--wait", timeout_s=400)
    url = platform.ekiben_json("deployments", "get", name)["urls"][0]
    answer = http("POST", f"{url}/double", b"ha", {"content-type": "text/plain"})
    assert (answer.status, answer.body) == (200, b"haha")
    assert http("POST", f"{url}/keys", b'{"b": 1, "a": 2}', {"content-type": "application/json"}).json() == ["a", "b"]

    old("delete", tag, "--yes")
    old("pull", tag)
    assert tag.split(":")[1] in old("list", "-o", "json").stdout
    platform.ekiben("deployments", "delete", name, "--yes")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_old_client_pushes_and_pulls_a_model(
    platform: Platform, old_bentoml: dict[str, BentoMl], version: str
) -> None:
    old = old_bentoml[version]
    script = (
        "import bentoml, os\n"
        "from bentoml._internal.models.model import ModelContext\n"
        "context = ModelContext(framework_name='custom', framework_versions={})\n"
        "with bentoml.models.create('old-weights', module='bentoml.picklable_model', api_version='v1', signatures={}, context=context) as m:\n"
        "    open(os.path.join(m.path, 'w.txt'), 'w').write('7')\n"
        "print(m.tag)\n"
    )
    made = subprocess.run([old.bin / "python", "-c", script], env=old.env, capture_output=True, text=True, check=True)
    tag = made.stdout.strip().splitlines()[-1]
    old("models", "push", tag)
    assert [m for m in platform.ekiben_json("models", "list") if m["name"].endswith("/" + tag.split(":")[1])]
    old("models", "delete", tag, "--yes")
    if version == "1.1":  # `bentoml models pull` of 1.0 fails in the client itself
        old("models", "pull", tag)
        assert tag.split(":")[1] in old("models", "list", "-o", "json").stdout
