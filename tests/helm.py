"""The real `helm` for tests, built once by Go below `$EKIBEN_TEST_CACHE` or `~/.cache/ekiben-tests`."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bentoml_clients import cache_dir
from tests.platform import ROOT, run

VERSION = "v4.3.1"
CHART = ROOT / "deploy" / "helm" / "ekiben"
EXAMPLES = CHART / "examples"
MISSING = "helm is not built: it needs Go (Debian: apt-get install golang), then `make test-servers`"


def helm_program(*, build: bool = True) -> Path | None:
    """The program; None where it is not there and there is no Go to build it with."""
    home = cache_dir() / f"helm-{VERSION}"
    program = home / "helm"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None or not build:
        return None
    home.mkdir(parents=True, exist_ok=True)
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            # Into a folder beside, then renamed: a build that is killed leaves nothing that would be taken for whole.
            with tempfile.TemporaryDirectory(dir=home) as folder:
                subprocess.run(
                    [go, "install", f"helm.sh/helm/v4/cmd/helm@{VERSION}"],
                    env=os.environ | {"GOBIN": folder, "GOFLAGS": "-p=2", "CGO_ENABLED": "0"},
                    check=True,
                )
                (Path(folder) / "helm").rename(program)
    return program


@dataclass(frozen=True)
class Helm:
    """Helm on a cluster, or on none."""

    program: Path
    home: Path
    kubeconfig: Path | None = None

    def __call__(self, *words: str, check: bool = True, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        """Run it."""
        folders = {f"HELM_{name}_HOME": str(self.home / name) for name in ("CONFIG", "CACHE", "DATA")}
        env = os.environ | folders | ({"KUBECONFIG": str(self.kubeconfig)} if self.kubeconfig else {})
        return run([str(self.program), *words], env=env, check=check, timeout_s=timeout_s)

    def json(self, *words: str) -> Any:
        """What it says with `-o json`."""
        return json.loads(self(*words, "-o", "json").stdout)


if __name__ == "__main__":
    print(helm_program() or sys.exit(MISSING))
