"""The servers that we measure beside ours, each in an environment of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.platform import free_port

CACHE = Path(os.environ.get("EKIBEN_TEST_CACHE", Path.home() / ".cache" / "ekiben-tests"))


def environment(name: str, *requirements: str) -> Path:
    """The bin folder of a virtual environment with these requirements, made once."""
    folder = CACHE / "peers" / name
    if not (folder / "complete").exists():
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", folder, *requirements], check=True)
        (folder / "complete").touch()
    return folder / "bin"


@contextlib.contextmanager
def mlflow_server(data: Path, database: str = "") -> Iterator[tuple[str, int]]:
    """An MLflow tracking server with one worker, on SQLite or the PostgreSQL given: its URL and process id."""
    if database:
        bin_folder = environment("mlflow-postgresql", "mlflow>=3", "psycopg2-binary")
    else:
        bin_folder = environment("mlflow", "mlflow>=3")
    data.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if database:  # its seven workers for jobs are no part of a registry
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    server = subprocess.Popen(
        [
            bin_folder / "mlflow",
            "server",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--backend-store-uri={database or f'sqlite:///{data}/mlflow.db'}",
            f"--artifacts-destination={data}/artifacts",
            "--workers=1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
        cwd=data,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300  # beside other work it takes minutes
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.05)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its workers for jobs stay behind
