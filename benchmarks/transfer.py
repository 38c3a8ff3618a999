"""(b) Push and pull of a 1 GiB model, beside `cp` and beside the hash alone."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from benchmarks.measure import Table, descendants, rss_mib, timed
from tests.bentoml_clients import client
from tests.platform import BentoMl, Platform

SIZE = 1 << 30
MIB = 1 << 20


def hash_alone(path: Path) -> None:
    """Read and hash, as Python does it best."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


class Peak(threading.Thread):
    """The largest resident memory of a tree while it runs, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.mib, self._stop_asked = pid, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(0.1):
            self.mib = max(self.mib, rss_mib(descendants(self.pid)))

    def stop(self) -> float:
        self._stop_asked.set()
        self.join()
        return self.mib


def run(rounds: int) -> None:
    """Push with our own client and with `bentoml`, pull with both; each time a new content."""
    table = Table("Transfer of a 1 GiB model")
    figures: dict[str, list[float]] = {
        key: [] for key in ("cp", "hash", "push", "pull", "bentoml push", "bentoml pull")
    }
    grown = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        platform = Platform(home / "data")
        try:
            platform.start()
            assert platform.process is not None
            bentoml = BentoMl(client("1.4"), home / "client").login(platform)
            for index in range(rounds):
                script = (
                    "import bentoml, os, sys\n"
                    "with bentoml.models.create(sys.argv[1]) as m:\n"
                    "    with open(os.path.join(m.path, 'weights.bin'), 'wb') as f:\n"
                    "        block = os.urandom(1 << 24)\n"
                    "        for i in range(int(sys.argv[2])): f.write(i.to_bytes(8, 'big') + block[8:])\n"
                    "print(m.path)\n"
                )
                made = subprocess.run(
                    [bentoml.bin / "python", "-c", script, f"bench{index}", str(SIZE >> 24)],
                    env=bentoml.env,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                path = Path(made.stdout.strip())
                weights = path / "weights.bin"
                tag = f"bench{index}:{path.name}"
                figures["hash"].append(SIZE / timed(lambda weights=weights: hash_alone(weights)) / MIB)
                figures["cp"].append(
                    SIZE
                    / timed(lambda weights=weights: subprocess.run(["cp", weights, home / "copy"], check=True))
                    / MIB
                )
                (home / "copy").unlink()
                before = rss_mib(descendants(platform.process.pid))
                peak = Peak(platform.process.pid)
                os.environ["BENTOML_HOME"] = bentoml.env["BENTOML_HOME"]
                figures["push"].append(SIZE / timed(lambda tag=tag: platform.ekiben("models", "push", tag)) / MIB)
                pulled = home / "pulled"
                figures["pull"].append(
                    SIZE / timed(lambda tag=tag: platform.ekiben("models", "pull", tag, "--output", str(pulled))) / MIB
                )
                grown.append(peak.stop() - before)
                shutil.rmtree(pulled, ignore_errors=True)
                platform.ekiben("models", "delete", tag, "--yes")
                figures["bentoml push"].append(SIZE / timed(lambda tag=tag: bentoml("models", "push", tag)) / MIB)
                bentoml("models", "delete", tag, "--yes")
                figures["bentoml pull"].append(SIZE / timed(lambda tag=tag: bentoml("models", "pull", tag)) / MIB)
                bentoml("models", "delete", tag, "--yes")
        finally:
            platform.close()
    for key in ("push", "pull", "bentoml push", "bentoml pull"):
        table.add(f"{key} (target: at least 0.5 of the hash)", figures[key], figures["hash"], "MiB/s", "sha256 alone")
        table.add(f"{key}", figures[key], figures["cp"], "MiB/s", "cp")
    table.note("memory that the platform grew by (target: under 200 MiB)", f"{max(grown):.0f} MiB")
    table.print()
