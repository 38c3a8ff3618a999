"""Images of real bentos, assembled without a server, run by real container engines."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.platform import BIN, BentoMl, free_port, http, run, wait_for


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, bentos: Path) -> dict[str, Any]:
    """A bento with a model, built by the real client, and its image."""
    for program in ("podman", "runc", "skopeo", "umoci"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")
    base = base_image()
    folder = tmp_path_factory.mktemp("images")
    bentoml = BentoMl(client("1.4"), folder / "home")
    project = shutil.copytree(bentos / "modelled", folder / "project")
    run([str(bentoml.bin / "python"), "make_model.py", "3"], env=bentoml.env, cwd=project)
    bentoml("build", ".", cwd=project)
    (tag,) = [each["tag"] for each in json.loads(bentoml("list", "-o", "json").stdout)]
    return {"tag": tag, "env": bentoml.env, "base": base, "folder": folder, "bentoml": bentoml}


def build(
    built: dict[str, Any], output: Path, cache: Path, bento: str = "", options: Sequence[object] = ()
) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ekiben"), "images", "build", bento or built["tag"], "--base", built["base"]]
    env = {**built["env"], "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system"}
    command += ["--output", f"oci:{output}", "--cache", str(cache), *map(str, options)]
    return run(command, env=env, timeout_s=400)


@pytest.fixture(scope="module")
def image(built: dict[str, Any]) -> Path:
    """The layout that holds the image."""
    build(built, built["folder"] / "layout", built["folder"] / "cache")
    return Path(built["folder"] / "layout")


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The podman command with stores of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ekp", dir="/tmp"))
    config = folder / "containers.conf"
    config.write_text('[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]\n')
    os.environ["CONTAINERS_CONF"] = str(config)
    command = ["podman", "--root", f"{folder}/r", "--runroot", f"{folder}/rr", "--runtime", "runc"]
    yield command
    subprocess.run([*command, "rm", "--all", "--force"], capture_output=True)
    subprocess.run([*command, "rmi", "--all", "--force"], capture_output=True)
    del os.environ["CONTAINERS_CONF"]
    shutil.rmtree(folder, ignore_errors=True)


def test_the_image_answers_as_bentomls_own_would(image: Path, built: dict[str, Any], podman: list[str]) -> None:
    version = built["tag"].partition(":")[2]
    name = run([*podman, "pull", "-q", f"oci:{image}:{version}"], env=os.environ).stdout.strip()
    port = free_port()
    options = ["--rm", "--detach", "--network", "host", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all"]
    container = run(
        [*podman, "run", *options, "-e", f"PORT={port}", "-e", "BENTOML_HOME=/tmp/bentoml", name], env=os.environ
    ).stdout.strip()
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for("the replica", lambda: http("GET", f"{url}/readyz", timeout_s=2).status == 200, 120)
        answer = http("POST", f"{url}/predict", b'{"x": 2}', {"content-type": "application/json"})
        assert (answer.status, answer.json()) == (200, 6.0), answer.body

        def inside(command: str) -> str:
            return run([*podman, "exec", container, "sh", "-c", command], env=os.environ).stdout.strip()

        assert inside("id -u; id -un; pwd").split() == ["1034", "bentoml", "/home/bentoml/bento"]
        assert inside("command -v bentoml; command -v python") == "/app/.venv/bin/bentoml\n/app/.venv/bin/python"
        assert inside("echo $BENTO_PATH $BENTOML_CONTAINERIZED") == "/home/bentoml/bento true"
        # Compiled for where it lies: nothing of the machine that built it is in there.
        compiled = "import bentoml, sys; print(bentoml.__spec__.cached); print(bentoml.load.__code__.co_filename)"
        paths = inside(f"python -c '{compiled}'").split()
        assert all(path.startswith("/app/.venv/lib/") for path in paths)
        assert inside(f"ls {paths[0]}") == paths[0]
    finally:
        subprocess.run([*podman, "stop", "-t", "5", container], capture_output=True)


def test_equal_bentos_give_one_digest_wherever_and_whenever(image: Path, built: dict[str, Any], tmp_path: Path) -> None:
    repository, _, version = built["tag"].partition(":")
    bento = tmp_path / "somewhere" / "else"
    old_umask = os.umask(0o027)
    try:
        shutil.copytree(Path(built["env"]["BENTOML_HOME"]) / "bentos" / repository / version, bento)
        for number, path in enumerate(sorted(bento.rglob("*"), reverse=True)):
            os.utime(path, (1_000_000_000 + number, 1_000_000_000 + number))
        first = build(built, tmp_path / "layout", tmp_path / "a cache of another length", str(bento)).stdout.strip()
    finally:
        os.umask(old_umask)
    again = build(built, image, built["folder"] / "cache")
    assert again.stdout.strip() == first
    assert "is there already" in again.stderr and "Made the layer" not in again.stderr


def test_other_tools_read_what_is_written(image: Path, built: dict[str, Any], tmp_path: Path) -> None:
    version = built["tag"].partition(":")[2]
    shown = json.loads(run(["skopeo", "inspect", f"oci:{image}:{version}"], env=os.environ).stdout)
    assert shown["Labels"]["dev.ekiben.bento"] == built["tag"]
    run(["skopeo", "copy", f"oci:{image}:{version}", f"oci:{tmp_path}/copy:v"], env=os.environ)
    run(["umoci", "unpack", "--image", f"{tmp_path}/copy:v", f"{tmp_path}/bundle"], env=os.environ, timeout_s=300)
    root = tmp_path / "bundle" / "rootfs"
    assert (root / "home/bentoml/bento/bento.yaml").stat().st_uid == 1034
    assert list((root / "home/bentoml/bento/models").glob("*/*/model.yaml"))


def test_a_base_that_is_not_there_is_refused(built: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has no image"):
        build({**built, "base": f"oci:{tmp_path}/nothing"}, tmp_path / "layout", built["folder"] / "cache")
    assert not (tmp_path / "layout" / "index.json").exists()


def test_an_image_says_what_it_is_made_of_and_who_signed_it(image: Path, built: dict[str, Any], tmp_path: Path) -> None:
    named = f"oci:{image}:{built['tag'].partition(':')[2]}"

    def images(*arguments: object) -> str:
        return run([str(BIN / "ekiben"), "images", *map(str, arguments)], env=built["env"]).stdout

    bill = json.loads(images("sbom", named))
    kinds = {each["name"]: each["type"] for each in bill["components"]}
    assert kinds["bentoml"] == "library" and "machine-learning-model" in kinds.values()
    public = images("keygen", tmp_path / "our.key", "--no-password").strip()
    signed = build(built, image, built["folder"] / "cache", options=["--sign-key", tmp_path / "our.key"]).stdout.strip()
    assert images("verify", named, "--key", public, "--whole").strip() == signed
    first = images("attestations", named, "--key", public, "-o", "json")
    said = json.loads(images("provenance", named, "--key", public))
    dependencies = {each["uri"]: each.get("digest") for each in said["buildDefinition"]["resolvedDependencies"]}
    assert dependencies[f"bento:{built['tag']}"] and any(each.startswith("model:") for each in dependencies)
    again = build(built, image, built["folder"] / "cache", options=["--sign-key", tmp_path / "our.key"]).stdout.strip()
    assert (again, images("attestations", named, "--key", public, "-o", "json")) == (signed, first)
