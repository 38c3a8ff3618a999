"""Real readers of layers that are pulled lazily: the libraries with which stargz-snapshotter and podman do it.

They are built once, by Go, below `$EKIBEN_TEST_CACHE` or `~/.cache/ekiben-tests`:

    python -m tests.lazyread        # build them (`make test-servers` does so), and print where they are
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.bentoml_clients import cache_dir

MISSING = (
    "the readers of lazy layers are not built: they need Go (Debian: apt-get install golang), then `make test-servers`"
)
PROGRAMS = ("estargz", "zstdchunked")
_SOURCES = Path(__file__).parent


def readers(*, build: bool = True) -> Path | None:
    """The folder of the programs; None where they are not there and there is no Go to build them with."""
    sources = [_SOURCES / name for name in ("go.mod", "go.sum", *(f"{each}/main.go" for each in PROGRAMS))]
    hashed = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    home = cache_dir() / f"lazyread-{hashed}"
    if (home / "bin").exists():
        return home / "bin"
    go = shutil.which("go")
    if go is None or not build:
        return None
    home.mkdir(parents=True, exist_ok=True)
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "bin").exists():
            # Into a folder beside, then renamed: a build that is killed leaves nothing that would be taken for whole.
            with tempfile.TemporaryDirectory(dir=home) as folder:
                done = subprocess.run(
                    [go, "build", "-tags", "exclude_graphdriver_btrfs", "-o", f"{folder}/bin/", "./..."],
                    cwd=_SOURCES,
                    env=os.environ | {"GOFLAGS": "-p=2", "CGO_ENABLED": "0"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"the readers of lazy layers could not be built:\n{done.stdout}{done.stderr}")
                (Path(folder) / "bin").rename(home / "bin")
    return home / "bin"
