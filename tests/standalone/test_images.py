"""Images of real bentos, assembled without a server, run by real container engines."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import oci_registry as registries
from tests.base_image import base_image, foreign_base_image
from tests.bentoml_clients import client
from tests.engines import containerd
from tests.oci_proxy import faulty_registry
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


@contextmanager
def predicting(podman: list[str], layout: Path, version: str) -> Iterator[str]:
    """A container of an image that was seen to predict."""
    name = run([*podman, "pull", "-q", f"oci:{layout}:{version}"], env=os.environ).stdout.strip()
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
        yield container
    finally:
        subprocess.run([*podman, "stop", "-t", "5", container], capture_output=True)


def test_the_image_answers_as_bentomls_own_would(image: Path, built: dict[str, Any], podman: list[str]) -> None:
    with predicting(podman, image, built["tag"].partition(":")[2]) as container:

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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zstd", "estargz", "zstd:chunked"])
def test_an_image_runs_however_its_layers_are_packed(
    image: Path, built: dict[str, Any], podman: list[str], tmp_path: Path, method: str
) -> None:
    """Gzip is what all other tests run."""
    version = built["tag"].partition(":")[2]
    build(built, tmp_path / "layout", built["folder"] / "cache", options=["--compression", method])
    with predicting(podman, tmp_path / "layout", version):
        pass
    # containerd unpacks by itself, and reads of an archive what skopeo left as it was.
    archive = f"{tmp_path}/image.tar"
    run(["skopeo", "copy", f"oci:{tmp_path}/layout:{version}", f"oci-archive:{archive}:app:v1"], env=os.environ)
    with containerd() as ctr:
        ctr("images", "import", "--digests", "--base-name", "app", archive)
        (name, *_) = [each for each in ctr("images", "list", "--quiet").stdout.split() if each.startswith("app@")]
        code = "import bentoml, sys; print(bentoml.__version__, sys.prefix)"
        ran = ctr("run", "--rm", name, f"run-{os.urandom(4).hex()}", "python", "-c", code).stdout.split()
        assert ran[1:] == ["/app/.venv"]


def test_an_image_for_another_platform_predicts_there(built: dict[str, Any], tmp_path: Path) -> None:
    base, emulator = foreign_base_image()
    built = {**built, "base": base}
    build(built, tmp_path / "layout", built["folder"] / "cache", options=["--platform", "linux/arm64"])
    version = built["tag"].partition(":")[2]
    run(
        ["umoci", "unpack", "--image", f"{tmp_path}/layout:{version}", f"{tmp_path}/bundle"],
        env=os.environ,
        timeout_s=300,
    )
    root = tmp_path / "bundle" / "rootfs"
    shutil.copy2(emulator, root / "usr/bin")
    code = (
        "import bentoml, platform; print(platform.machine(), bentoml.load('/home/bentoml/bento').inner().predict(x=2))"
    )
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())["process"]
    assert config["cwd"] == "/home/bentoml/bento"
    env = dict(each.split("=", 1) for each in config["env"]) | {"BENTOML_DO_NOT_TRACK": "True"}
    argv = [f"/usr/bin/{Path(emulator).name}", "/app/.venv/bin/python", "-c", code]
    enter = f"import os; os.chroot({str(root)!r}); os.chdir({config['cwd']!r}); os.execv({argv[0]!r}, {argv!r})"
    shown = run([sys.executable, "-c", enter], env=env, timeout_s=300)
    assert shown.stdout.split() == ["aarch64", "6.0"]


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
    with pytest.raises(AssertionError, match="There is no image layout"):
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


async def test_a_base_from_a_registry_and_a_push_that_is_killed_loses_a_layer_and_finds_what_is_there(
    image: Path, built: dict[str, Any], tmp_path: Path
) -> None:
    """The way to a registry, with all that may happen on it."""
    if registries.distribution() is None:
        pytest.skip(registries.MISSING)
    with registries.run_registry(tmp_path / "registry", login=True) as registry:
        async with faulty_registry(registry) as proxy:
            logins = {"auths": {proxy.host: {"auth": registry.auth()}}}
            (tmp_path / "logins.json").write_text(json.dumps(logins))
            env = {
                **built["env"],
                "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system",
                "REGISTRY_AUTH_FILE": str(tmp_path / "logins.json"),
                "EKIBEN_REGISTRY_INSECURE": proxy.host,
            }

            async def ekiben(*arguments: str) -> asyncio.subprocess.Process:
                command = [str(BIN / "ekiben"), "images", *arguments]
                return await asyncio.create_subprocess_exec(
                    *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
                )

            async def done(*arguments: str) -> tuple[str, str]:
                process = await ekiben(*arguments)
                out, err = await asyncio.wait_for(process.communicate(), 400)
                assert process.returncode == 0, err.decode()
                return out.decode().strip(), err.decode()

            await done("copy", built["base"], f"docker://{proxy.host}/base:1")
            cache = ["--cache", str(built["folder"] / "cache"), "--base", f"docker://{proxy.host}/base:1"]
            push = ["build", built["tag"], *cache, "--push", f"{proxy.host}/team/app"]

            # Killed while it sends: no tag, and the next one goes on from there.
            sending = asyncio.Event()

            def hang(operation: str, count: int) -> str:
                if operation in ("PUT upload", "PATCH upload") and proxy.seen["POST mount"]:
                    sending.set()
                    return "hang"
                return ""

            proxy.choose = hang
            killed = await ekiben(*push)
            reached, ended = asyncio.ensure_future(sending.wait()), asyncio.ensure_future(killed.communicate())
            await asyncio.wait([reached, ended], timeout=200, return_when=asyncio.FIRST_COMPLETED)
            assert reached.done(), ended.done() and ended.result()
            killed.kill()
            await ended
            await killed.wait()
            assert not (registry.folder / "docker/registry/v2/repositories/team/app/_manifests/tags").exists()

            # A layer that is lost between the question and the manifest is made and sent once more.
            lost: list[Path] = []

            def lose(operation: str, count: int) -> str:
                if operation == "PUT manifest" and not lost:
                    layers = [each for each in blobs_of(image) if registry.blob(each).exists()]
                    lost.append(registry.blob(layers[0]))
                    lost[-1].unlink()
                return ""

            proxy.choose = lose
            digest, said = await done(*push)
            assert lost and "sending them once more" in said
            assert lost[-1].exists()

            # Another repository of that registry has every layer from this one, and nothing is sent.
            proxy.choose = lambda operation, count: ""
            proxy.received.clear()
            again, said = await done(*push[:-1], f"{proxy.host}/team/other:v2")
            assert again == digest and "Made the layer" not in said and "Copied" not in said
            assert proxy.received["PUT upload"] + proxy.received["PATCH upload"] < 1 << 20

            shown = await done("copy", f"docker://{proxy.host}/team/other:v2", f"oci:{tmp_path}/back:v2")
            assert shown[0] == digest
    labels = json.loads(run(["skopeo", "inspect", f"oci:{tmp_path}/back:v2"], env=os.environ).stdout)["Labels"]
    assert labels["dev.ekiben.bento"] == built["tag"]


def blobs_of(image: Path) -> list[str]:
    """The layers of our own in the layout's image, which come after the base's."""
    index = json.loads((image / "index.json").read_text())
    (entry, *_) = [each for each in index["manifests"] if "artifactType" not in each]
    manifest = json.loads((image / "blobs" / "sha256" / entry["digest"].partition(":")[2]).read_text())
    return [layer["digest"] for layer in manifest["layers"][1:]]
