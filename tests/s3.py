"""A real S3 server for tests and benchmarks: versitygw, which keeps objects as files of a folder.

It is built once, by Go, below `$EKIBEN_TEST_CACHE` or `~/.cache/ekiben-tests`:

    python -m tests.s3        # build it (`make test-servers` does so), and print where it is

The fixture `s3` (in tests/conftest.py) is one server for the session; `s3.new_bucket()` gives a bucket of its own to each test.
Credentials are in the environment while it runs, as botocore and every child process look for them there.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.bentoml_clients import cache_dir
from tests.platform import free_port

VERSION = "v1.8.0"
ACCESS_KEY, SECRET_KEY = "ekiben-test-key", "ekiben-test-secret"
REGION = "us-east-1"
MISSING = (
    "versitygw, the S3 server, is not built: it needs Go (Debian: apt-get install golang), then `make test-servers`"
)


@dataclass(frozen=True)
class S3Server:
    """A server that runs. Whoever has `environment` may do everything."""

    endpoint: str
    folder: Path
    """Each bucket is a folder in here, each object a file: a test may look, and damage."""
    log: Path
    pid: int
    environment: dict[str, str]

    def client(self) -> Any:
        """A plain boto3 client; close it or let it go."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )

    def new_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"test-{os.urandom(6).hex()}"
        self.client().create_bucket(Bucket=name)
        return name

    def url(self, bucket: str, prefix: str = "", *, endpoint: str = "") -> str:
        """The blobs' URL of a bucket; `endpoint` is another way to this server, as through a proxy."""
        at = quote(endpoint or self.endpoint, safe="")
        return f"s3://{bucket}{f'/{prefix}' if prefix else ''}?endpoint={at}&region={REGION}&path_style=true"

    def new_url(self) -> str:
        """The blobs' URL of a new bucket."""
        return self.url(self.new_bucket())


def versitygw(*, build: bool = True) -> Path | None:
    """The server's program; None where it is not there and there is no Go to build it with.

    Processes that ask at once wait for the one that builds.
    """
    home = cache_dir() / f"versitygw-{VERSION}"
    program = home / "versitygw"
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
                done = subprocess.run(
                    [go, "install", f"github.com/versity/versitygw/cmd/versitygw@{VERSION}"],
                    env=os.environ | {"GOBIN": folder, "GOFLAGS": "-p=2", "CGO_ENABLED": "0"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"versitygw could not be built:\n{done.stdout}{done.stderr}")
                (Path(folder) / "versitygw").rename(program)
    return program


@contextlib.contextmanager
def run_s3(folder: Path | None = None) -> Iterator[S3Server]:
    """Run a server with its objects in `folder` (a new one, removed afterwards, by default) while inside.

    Raises:
        FileNotFoundError: the program cannot be had here; the message says what is missing.
    """
    program = versitygw()
    if program is None:
        raise FileNotFoundError(MISSING)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="ek-s3-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        endpoint, server = _start(program, folder, data)
        stack.callback(_stop, server)
        environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        yield S3Server(endpoint, data, folder / "log", server.pid, environment)


def _start(program: Path, folder: Path, data: Path) -> tuple[str, "subprocess.Popen[bytes]"]:
    """A server that answers. A port that somebody else took meanwhile is given up for another."""
    environment = os.environ | {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    for _ in range(5):
        address = f"127.0.0.1:{free_port()}"
        with (folder / "log").open("ab") as log:
            command = [program, "--port", address, "--region", REGION, "--health", "/health", "posix", data]
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        deadline = time.monotonic() + 30
        while server.poll() is None and time.monotonic() < deadline:
            if _answers(f"http://{address}/health"):
                return f"http://{address}", server
            time.sleep(0.02)
        _stop(server)
    raise RuntimeError(f"versitygw did not start:\n{(folder / 'log').read_text()[-2000:]}")


def _answers(url: str) -> bool:
    import urllib.request

    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as response:
        return bool(response.status == 200)
    return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    built = versitygw()
    print(built or MISSING, file=sys.stdout if built else sys.stderr)
