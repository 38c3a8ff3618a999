"""The README's tour, verbatim: a newcomer's first quarter of an hour."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.platform import ROOT, Platform, running


def tour() -> str:
    """Every command of the README's tour, as one script."""
    blocks = re.findall(r"^```tour\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    return "\n".join(blocks)


def port_is_free(port: int) -> bool:
    """Whether nobody listens on it."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.timeout(1200)
def test_the_tour_of_the_readme_runs_as_it_is_written(tmp_path: Path) -> None:
    run_tour(tmp_path, {})


def run_tour(tmp_path: Path, env: dict[str, str]) -> None:
    """Run the tour against a platform that is started with `env`."""
    checkout = tmp_path / "ekiben"
    checkout.mkdir()
    for name in ("examples", "tests/bentos"):
        shutil.copytree(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to(ROOT / ".venv")
    # 7400 is the README's port; on a machine where Ekiben runs already another takes its place.
    platform_port = 7400 if port_is_free(7400) else Platform(tmp_path).port
    with running(checkout / "data", port=platform_port, env=env):
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", tour().replace(":7400", f":{platform_port}")],
            cwd=checkout,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "LANG": "C.UTF-8",
                **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))},
            },
            capture_output=True,
            text=True,
            timeout=1100,
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "the weights are missing" in done.stdout
    assert "DEPLOYMENT_NOT_READY" in done.stdout
    assert (checkout / "normalized.csv").read_text().startswith("a,b\n")
