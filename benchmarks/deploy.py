"""(c) From `bentoml deploy` to the first answer, beside making the environment and running `bentoml serve` by hand."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Table, timed
from tests.bentoml_clients import client
from tests.platform import BentoMl, Platform, free_port, http, wait_for

BENTO = Path(__file__).resolve().parent.parent / "tests" / "bentos" / "versions"


def until_answer(url: str) -> None:
    """Poll, each 50 ms, until the service answers a prediction."""

    def answers() -> bool:
        return http("POST", f"{url}/version", b"{}", {"content-type": "application/json"}, timeout_s=5).status == 200

    wait_for(url, answers, 300)


def environment(venv: Path, requirements: Path, env: dict[str, str]) -> None:
    """A virtual environment with these requirements."""
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, venv], env=env, check=True)
    subprocess.run([uv, "pip", "install", "-q", "--python", venv, "-r", requirements], env=env, check=True)


def run(rounds: int) -> None:
    """Cold: nothing cached on either side. Warm: the environment is there on both sides."""
    table = Table("From deploy to the first answer")
    cold, warm, hand_cold, hand_warm = [], [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            project = home / "project"
            shutil.copytree(BENTO, project)
            platform = Platform(home / "data")
            try:
                platform.start()
                bentoml = BentoMl(client("1.4"), home / "client").login(platform)

                def deploy(name: str, bento: str, platform: Platform = platform) -> None:
                    platform.ekiben("deployments", "create", bento, "--name", name, "--no-wait", timeout_s=400)
                    until_answer(str(platform.ekiben_json("deployments", "get", name)["urls"][0]))

                bentoml("build", ".", cwd=project)
                bentoml("push", "versions:latest", cwd=project)
                bento = next((home / "client" / "bentoml" / "bentos" / "versions").glob("*/"))
                requirements = bento / "env" / "python" / "requirements.txt"
                # Not counted: the first who asks pays for what an index, or a proxy before it, then remembers.
                environment(home / "first", requirements, os.environ | {"UV_CACHE_DIR": str(home / "first-cache")})
                cold.append(timed(lambda: deploy("cold", "versions")))
                platform.ekiben("deployments", "terminate", "cold")
                warm.append(timed(lambda: deploy("warm", "versions")))
            finally:
                platform.close()
            venv = home / "venv"
            env = os.environ | {
                "UV_CACHE_DIR": str(home / "uv"),
                "BENTOML_DO_NOT_TRACK": "True",
                "BENTOML_HOME": str(home / "hand"),
            }

            def serve(env: dict[str, str] = env, venv: Path = venv, bento: Path = bento) -> None:
                port = free_port()
                server = subprocess.Popen(
                    [venv / "bin" / "bentoml", "serve", bento, "--host", "127.0.0.1", "--port", str(port)],
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                try:
                    until_answer(f"http://127.0.0.1:{port}")
                finally:
                    server.terminate()
                    server.wait()

            began = time.perf_counter()
            environment(venv, requirements, env)
            serve()
            hand_cold.append(time.perf_counter() - began)
            hand_warm.append(timed(serve))
    table.add("cold environment cache", cold, hand_cold, "s", "uv venv + uv pip install + bentoml serve")
    table.add("warm environment cache (target: at most 1.2)", warm, hand_warm, "s", "bentoml serve, environment there")
    table.print()
