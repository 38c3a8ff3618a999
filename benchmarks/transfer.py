"""(b) Push and pull of a 1 GiB model, beside `cp` and beside the hash alone."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Table, cpu_of, descendants, rss_mib
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


MAKE = """
import bentoml, os, sys
with bentoml.models.create(sys.argv[1]) as model:
    with open(os.path.join(model.path, "weights.bin"), "wb") as file:
        block = os.urandom(1 << 24)
        for number in range(int(sys.argv[2])):
            file.write(number.to_bytes(8, "big") + block[8:])
print(bentoml.models.get(sys.argv[1]).path)
"""
WHAT = ("hash", "cp", "push", "pull", "bentoml push", "bentoml pull", "listing")


def make(bentoml: BentoMl, name: str) -> Path:
    """A model in the client's store whose bytes nobody has seen: its folder."""
    command = [str(bentoml.bin / "python"), "-c", MAKE, name, str(SIZE >> 24)]
    done = subprocess.run(command, env=bentoml.env, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def run(rounds: int) -> None:
    """Push with our own client and with `bentoml`, pull with both; each time a new content."""
    table = Table("Transfer of a 1 GiB model")
    speed: dict[str, list[float]] = {what: [] for what in WHAT}
    cpu: dict[str, list[float]] = {what: [] for what in WHAT}
    grown = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        platform = Platform(home / "data")
        try:
            platform.start()
            assert platform.process is not None
            pid = platform.process.pid
            bentoml = BentoMl(client("1.4"), home / "client").login(platform)
            os.environ["BENTOML_HOME"] = bentoml.env["BENTOML_HOME"]

            def measure(what: str, action: Callable[[], object], pid: int = pid) -> None:
                wall_s, cpu_s = cpu_of(action, pid)
                speed[what].append(SIZE / wall_s / MIB)
                cpu[what].append(cpu_s)

            def measure_all(path: Path, tag: str, platform: Platform = platform, bentoml: BentoMl = bentoml) -> None:
                copy, pulled = home / "copy", home / "pulled"
                measure("hash", lambda: hash_alone(path / "weights.bin"))
                measure("cp", lambda: subprocess.run(["cp", path / "weights.bin", copy], check=True))
                copy.unlink()
                before, peak = rss_mib(descendants(pid)), Peak(pid)
                measure("push", lambda: platform.ekiben("models", "push", tag))
                # The registry hashes each file once more after a push, in its own time: that is no part of a pull.
                measure("listing", lambda: platform.ekiben("models", "files", tag))
                measure("pull", lambda: platform.ekiben("models", "pull", tag, "--to", str(pulled)))
                grown.append(peak.stop() - before)
                shutil.rmtree(pulled)
                platform.ekiben("models", "delete", tag, "--yes")
                measure("bentoml push", lambda: bentoml("models", "push", tag))
                platform.ekiben("models", "files", tag)
                bentoml("models", "delete", tag, "--yes")
                measure("bentoml pull", lambda: bentoml("models", "pull", tag))
                bentoml("models", "delete", tag, "--yes")
                platform.ekiben("models", "delete", tag, "--yes")

            for index in range(rounds):
                path = make(bentoml, f"bench{index}")
                measure_all(path, f"bench{index}:{path.name}")
        finally:
            platform.close()
    for what in WHAT[2:-1]:
        target = "" if what.startswith("bentoml") else " (target: at least 0.5)"
        table.add(f"{what}{target}", speed[what], speed["hash"], "MiB/s", "sha256 alone")
        table.add(what, speed[what], speed["cp"], "MiB/s", "cp, which syncs nothing")
        table.add(f"{what}, CPU of client and platform", cpu[what], cpu["hash"], "s", "sha256 alone")
    listing = sorted(cpu["listing"])[len(cpu["listing"]) // 2]
    table.note("the platform's own CPU after a push, which lists the content's files", f"{listing:.2f} s")
    table.note("memory that the platform grew by (target: under 200 MiB)", f"{max(grown):.0f} MiB")
    table.print()
