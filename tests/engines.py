"""Real container engines with stores of their own: podman, and containerd with its `ctr`. Both need root here."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.platform import run, wait_for


def needs(*programs: str) -> None:
    """Skip where one of them is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {program})")


@dataclass(frozen=True)
class Engine:
    """The command of an engine, on a store of its own."""

    command: list[str]
    env: dict[str, str]

    def __call__(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run it."""
        return run([*self.command, *arguments], env=self.env, check=check, timeout_s=timeout_s)


@contextlib.contextmanager
def podman() -> Iterator[Engine]:
    """podman over runc; images, containers and logins lie in a folder that goes."""
    needs("podman", "runc")
    folder = Path(tempfile.mkdtemp(prefix="ekp", dir="/tmp"))
    (folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]\n'
    )
    (folder / "auth.json").write_text("{}")
    engine = Engine(
        ["podman", "--root", f"{folder}/r", "--runroot", f"{folder}/rr", "--runtime", "runc"],
        os.environ | {"CONTAINERS_CONF": f"{folder}/containers.conf", "REGISTRY_AUTH_FILE": f"{folder}/auth.json"},
    )
    try:
        yield engine
    finally:
        engine("rm", "--all", "--force", check=False)
        engine("rmi", "--all", "--force", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def containerd() -> Iterator[Engine]:
    """`ctr` on a containerd that runs for it."""
    needs("containerd", "ctr", "runc")
    folder = Path(tempfile.mkdtemp(prefix="ekc", dir="/tmp"))
    (folder / "config.toml").write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{folder}/s"\n[ttrpc]\naddress = "{folder}/t"\n'
    )
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(["containerd", "-c", folder / "config.toml"], stdout=log, stderr=log)
    engine = Engine(["ctr", "-a", f"{folder}/s"], dict(os.environ))
    try:
        wait_for("containerd", lambda: engine("version", check=False).returncode == 0, 30)
        yield engine
    finally:
        daemon.terminate()
        daemon.wait(30)
        subprocess.run(["umount", "--recursive", "--lazy", f"{folder}/state"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
