"""Images of bentos that run commands while they are built, of both generations, beside what BentoML would make."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.engines import Engine, needs, podman
from tests.platform import BIN, BentoMl, free_port, http, run, wait_for

TOKEN = "correct-horse-battery"


@dataclass
class Shop:
    """Where bentos are built and images are made."""

    folder: Path
    base: str

    def bento(self, project: Path, version: str) -> Path:
        """Build a bento by a real client; its folder."""
        bentoml = BentoMl(client(version), self.folder / version)
        bentoml("build", ".", cwd=shutil.copytree(project, self.folder / project.name))
        (tag,) = [each["tag"] for each in json.loads(bentoml("list", "-o", "json").stdout)]
        return Path(bentoml.env["BENTOML_HOME"]) / "bentos" / tag.replace(":", "/")

    def image(self, bento: Path, output: str, *options: str, **env: str) -> tuple[str, str]:
        """Its image; digest and log."""
        command = [str(BIN / "ekiben"), "images", "build", str(bento), "--base", self.base, "--output", output]
        settings = {"EKIBEN_BUILDER_PYTHON_PREFERENCE": "system", "BENTOML_HOME": str(bento.parents[2])}
        environment = {**BentoMl(client("1.4"), self.folder / "home").env, **settings, **env}
        done = run([*command, "--cache", str(self.folder / "cache"), *options], env=environment, timeout_s=500)
        return done.stdout.strip(), done.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    needs("buildah", "podman", "runc", "skopeo")
    return Shop(tmp_path_factory.mktemp("commands"), base_image())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with podman() as engine:
        yield engine


def ask(engine: Engine, layout: Path, reference: str, body: bytes, kind: str) -> Any:
    """What the image's `look` says, run as the image itself wants to be."""
    name = engine("pull", "-q", f"oci:{layout}:{reference}").stdout.strip()
    port = free_port()
    options = ["--rm", "--detach", "--network", "host", "--cap-drop", "all", "-e", f"PORT={port}"]
    container = engine("run", *options, name).stdout.strip()
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for("the replica", lambda: http("GET", f"{url}/readyz", timeout_s=2).status == 200, 120)
        answer = http("POST", f"{url}/look", body, {"content-type": kind})
        assert answer.status == 200, answer.body
        return answer.json()
    finally:
        engine("stop", "-t", "5", container, check=False)


def assert_like_bentomls(bento: Path, layout: Path, reference: str) -> None:
    """Ports, user, entry point, folder and variables are those of the Dockerfile that `bentoml containerize` builds."""
    shown = json.loads(run(["skopeo", "inspect", "--config", f"oci:{layout}:{reference}"], env={}).stdout)["config"]
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert sorted(shown["ExposedPorts"]) == sorted(
        f"{port}/tcp" for port in re.findall(r"^EXPOSE (\d+)", dockerfile, re.M)
    )
    assert shown["User"] == re.findall(r"^USER (\S+)", dockerfile, re.M)[-1]
    assert shown["Entrypoint"] == json.loads(re.findall(r"^ENTRYPOINT (.*)", dockerfile, re.M)[-1])
    assert shown["WorkingDir"] == "/home/bentoml/bento" and "Cmd" not in shown
    ours = dict(each.split("=", 1) for each in shown["Env"])
    theirs = dict(re.findall(r"^ENV (\w+)[= ](.*)", dockerfile, re.M))
    known = {name: value.strip('"') for name, value in theirs.items() if "$" not in value}
    del_by_design = {"UV_COMPILE_BYTECODE", "UV_NO_PROGRESS"}
    assert {name: ours.get(name) for name in set(known) - del_by_design} == {
        name: known[name] for name in set(known) - del_by_design
    }


def test_commands_of_a_new_bento(shop: Shop, engine: Engine, bentos: Path) -> None:
    bento = shop.bento(bentos / "commanded", "1.4")
    layout = shop.folder / "layout"
    digest, log = shop.image(bento, f"oci:{layout}:new", BUILD_TOKEN=TOKEN)
    assert "the token is …" in log and TOKEN not in log
    for blob in (layout / "blobs" / "sha256").iterdir():
        assert TOKEN.encode() not in blob.read_bytes()
    left = list((shop.folder / "cache").glob("engine/**/*")) + list((shop.folder / "cache").glob("executed/**/*"))
    assert not [path for path in left if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert ask(engine, layout, "new", b"{}", "application/json") == {
        "program": "/usr/games/sl",
        "setting": 'a "b" $c',
        "token": str(len(TOKEN)),
        "after": ask_version(bento, "numpy"),
        "known": "nothing",
    }
    assert_like_bentomls(bento, layout, "new")
    # Another source line runs nothing; what the commands left is used again.
    (bento / "src" / "service.py").write_text((bento / "src" / "service.py").read_text() + "\n# changed\n")
    other, log = shop.image(bento, f"oci:{layout}:changed", BUILD_TOKEN=TOKEN)
    assert other != digest and "STEP" not in log and "Made the layer of bento" in log


def ask_version(bento: Path, package: str) -> str:
    requirements = (bento / "env" / "python" / "requirements.txt").read_text()
    return str(re.findall(rf"^{package}==(\S+)", requirements, re.M)[0])


def test_commands_of_an_old_bento_with_a_template(shop: Shop, engine: Engine, bentos: Path) -> None:
    bento = shop.bento(bentos / "templated", "1.1")
    layout = shop.folder / "layout"
    shop.image(bento, f"oci:{layout}:old")
    assert ask(engine, layout, "old", b"x", "text/plain") == {
        "before": "bentoml python:3.11-slim",
        "seen": "service.py\nsetup.sh",
        "after": "1.1.11",
        "greeting": "good day",
        "late": "yes",
        "user": 1034,
    }
    assert_like_bentomls(bento, layout, "old")
