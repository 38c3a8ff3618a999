"""The real `bentoml` commands of three generations, each in an environment of its own, made once and kept.

They lie below `$EKIBEN_TEST_CACHE`, or `~/.cache/ekiben-tests`. The first use of one needs a package index.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# What each client is installed with. `bentoml build` of 1.4 needs uv and imports the service, so what the tests' bentos
# import; the old ones import pkg_resources, and 1.0 breaks over a newer cattrs.
REQUIREMENTS = {
    "1.4": ("bentoml==1.4.39", "uv", "numpy"),
    "1.1": ("bentoml==1.1.11", "setuptools<81"),
    "1.0": ("bentoml==1.0.25", "setuptools<81", "cattrs<23.2"),
}

# The one Python on which all three run; another than the tests' own is uv's to find.
_PYTHON = sys.executable if sys.version_info[:2] == (3, 11) else "3.11"


def cache_dir() -> Path:
    """The folder that keeps what tests download, over runs."""
    return Path(os.environ.get("EKIBEN_TEST_CACHE") or Path.home() / ".cache" / "ekiben-tests")


def client(version: str) -> Path:
    """The `bin` folder of an environment with that generation of BentoML: `1.4`, `1.1` or `1.0`.

    Processes that ask at the same time wait for the one that makes it; one that dies in between leaves
    nothing that would be taken for whole.
    """
    generation = ".".join(version.split(".")[:2])
    requirements = REQUIREMENTS[generation]
    # Other requirements give another environment: one that somebody uses is never changed.
    digest = hashlib.sha256("\n".join((*requirements, _PYTHON)).encode()).hexdigest()[:8]
    home = cache_dir() / f"{requirements[0].replace('==', '-')}-{digest}"
    home.parent.mkdir(parents=True, exist_ok=True)
    complete = home / "complete"
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(home, ignore_errors=True)
            uv = _uv()
            _run(uv, "venv", "--quiet", "--python", _PYTHON, str(home))
            _run(uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *requirements)
            complete.touch()
    return home / "bin"


def environment(home: Path) -> dict[str, str]:
    """The environment for a client whose store and login lie in `home`, and which tells nobody what it does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("BENTO", "YATAI"))}
    return {**kept, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", "NO_COLOR": "1", "COLUMNS": "200"}


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.exists() else shutil.which("uv") or "uv"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
