"""The OCI distribution specification's own conformance suite, as a program. It is built once, by Go, as tests/s3.py does:

python -m tests.oci_conformance     # build it (`make test-servers` does so), and print where it is
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.bentoml_clients import cache_dir

MODULE = "github.com/opencontainers/distribution-spec/conformance"
VERSION = "v0.0.0-20260831232431-97274622c111"
MISSING = (
    "the OCI conformance suite is not built: it needs Go (Debian: apt-get install golang), then `make test-servers`"
)


def conformance(*, build: bool = True) -> Path | None:
    """The program; None where it is not there and there is no Go to build it with."""
    home = cache_dir() / f"oci-conformance-{VERSION.rpartition('-')[2]}"
    program = home / "conformance"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None or not build:
        return None
    home.mkdir(parents=True, exist_ok=True)
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            with tempfile.TemporaryDirectory(dir=home) as folder:
                done = subprocess.run(
                    [go, "install", f"{MODULE}@{VERSION}"],
                    env=os.environ | {"GOBIN": folder, "GOFLAGS": "-p=2", "CGO_ENABLED": "0"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"the conformance suite could not be built:\n{done.stdout}{done.stderr}")
                (Path(folder) / "conformance").rename(program)
    return program


def run_conformance(program: Path, folder: Path, settings: Mapping[str, str]) -> list[tuple[str, str]]:
    """Run it with these variables, less their `OCI_`; each of its tests and how it ended: Pass, FAIL, Skip, Disabled.

    What it prints is read: of a registry that takes no pushes this version dies (a nil pointer) when it writes its reports.
    """
    done = subprocess.run(
        [program],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            **{f"OCI_{key}": value for key, value in settings.items()},
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    found = re.findall(r"^ *OCI Conformance Test/(.+): (\w+)$", done.stdout, re.MULTILINE)
    assert found, f"the conformance suite ran no test:\n{done.stdout}{done.stderr}"
    failed = [name for name, verdict in found if verdict not in ("Pass", "Disabled", "Skip")]
    assert not failed, f"{failed}:\n{done.stdout}"
    return found


if __name__ == "__main__":
    found = conformance()
    print(found or MISSING)
    sys.exit(0 if found else 1)
