"""Images of the deployer's test bentos, in one OCI layout, and what it takes to run them."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.deployer.runtimes.podman import Podman
from tests.base_image import base_image
from tests.fixtures_deployer import Built, built
from tests.platform import BIN, run

__all__ = ["Made", "built", "images", "need_podman", "wipe"]


@dataclass(frozen=True)
class Made:
    """An image, as the builder tells of it."""

    location: str
    digest: str


def need_podman() -> None:
    """Skip the test on a machine that runs no containers."""
    for program in ("podman", "runc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")
    if os.getuid() != 0:
        pytest.skip("containers are tried as root here: rootless podman needs subordinate ids")


def wipe(podman: Podman) -> None:
    """Remove all that podman has. Not by `podman system reset`, which takes the networks of the machine along."""
    for words in (("rm", "--all", "--force", "--time", "0"), ("rmi", "--all", "--force")):
        subprocess.run(podman.command(*words), env=podman.env, capture_output=True, check=False)
    shutil.rmtree(podman.volatile, ignore_errors=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, built: Callable[..., Built]) -> Callable[..., Made]:
    """Makes the image of a bento, each once, all with one environment for one generation of client."""
    need_podman()
    base, folder = base_image(), tmp_path_factory.mktemp("images-of-replicas")
    known: dict[Path, Made] = {}

    def get(bento: Built) -> Made:
        if bento.folder not in known:
            reference = f"default/{bento.tag[0]}:{bento.tag[1]}"
            command = [str(BIN / "ekiben"), "images", "build", str(bento.folder), "--base", base]
            command += ["--output", f"oci:{folder}/layout:{reference}", "--cache", str(folder / "cache")]
            home = {
                "BENTOML_HOME": str(bento.folder.parent.parent.parent),
                "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system",
            }
            digest = run(command, env={**os.environ, **home}, timeout_s=400).stdout.strip()
            known[bento.folder] = Made(f"oci:{folder}/layout:{reference}", digest)
        return known[bento.folder]

    return get
