"""(d) From `ekiben up` to ready, and what it costs idle. The peer, an MLflow server, has one of our five parts."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Table, cpu_s, descendants, rss_mib, timed
from benchmarks.peers import mlflow_server
from tests.platform import Platform

IDLE_S = 20


def idle(pid: int) -> tuple[float, float]:
    """CPU milliseconds each second, and resident MiB, of a tree that nobody asks anything."""
    time.sleep(3)
    before = cpu_s(descendants(pid))
    time.sleep(IDLE_S)
    tree = descendants(pid)
    return (cpu_s(tree) - before) / IDLE_S * 1000, rss_mib(tree)


def run(rounds: int) -> None:
    """Start both, again and again; then let both idle."""
    table = Table("Start and idle")
    first, again, peer = [], [], []
    idle_cpu, idle_rss, peer_cpu, peer_rss = [], [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            platform = Platform(Path(folder) / "data")
            try:
                first.append(timed(platform.start))
                platform.stop()
                again.append(timed(platform.start))
                assert platform.process is not None
                cpu, rss = idle(platform.process.pid)
                idle_cpu.append(cpu)
                idle_rss.append(rss)
            finally:
                platform.close()
            began = time.perf_counter()
            with mlflow_server(Path(folder) / "mlflow") as (_, pid):
                peer.append(time.perf_counter() - began)
                cpu, rss = idle(pid)
                peer_cpu.append(cpu)
                peer_rss.append(rss)
    bare = [timed(lambda: subprocess.run([sys.executable, "-c", "import grpc.aio, sqlalchemy, aiohttp"], check=True))]
    table.add("first start to ready (target: under 3 s)", first, peer, "s", "mlflow server, to /health")
    table.add("second start to ready", again, peer, "s", "the same")
    table.note("of which Python importing grpc, sqlalchemy, aiohttp", f"{bare[0]:.2f} s")
    table.add("idle CPU", idle_cpu, peer_cpu, "ms/s", "the same")
    table.add("idle memory, whole tree", idle_rss, peer_rss, "MiB", "the same")
    table.print()
