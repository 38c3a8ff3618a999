"""Images of one bento, assembled by us and built by BentoML's own Dockerfile, after each kind of change.

    python -m benchmarks.images --rounds 1 --model-mib 500 --big-gib 5

The same bento, the same base, the same registry (tests/oci_registry.py), in the same run: cold, nothing changed, one line
of source, another model, one requirement more. Ours is `ekiben images build --push`; the peer is `bentoml containerize`
with buildah, and `buildah push`. What is asked for is a pushed image: wall, CPU and the largest memory of the processes,
and the bytes that the registry had not. Ours is measured once more without the start of Python, as in a builder that
runs. Then a large model: assembled once, and in the image of another bento that comes after.
"""

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.images.peer import Buildah, base, size_mib
from benchmarks.measure import Table, cpu_of, rss_mib
from benchmarks.transfer import Peak
from services.builder import offline
from tests.bentoml_clients import client
from tests.oci_registry import OciRegistry, run_registry
from tests.platform import BIN, BentoMl

MIB = 1 << 20
CHANGES = ("cold", "nothing changed", "one source line", "another model", "one more requirement")
SERVICE = """
import bentoml

VERSION = {version}


@bentoml.service
class Bench:
    weights = bentoml.models.BentoModel("{model}:latest")

    @bentoml.api
    def predict(self, x: float) -> float:
        return x * VERSION
"""
MODEL = """
import os, sys, bentoml
with bentoml.models.create(sys.argv[1]) as model:
    block = os.urandom(1 << 24)
    with open(os.path.join(model.path, "weights.bin"), "wb") as file:
        for number in range(int(sys.argv[2]) // 16):
            file.write(number.to_bytes(8, "big") + block[8:])
"""


class Project:
    """The bento: scikit-learn, numpy and BentoML, and a model of random bytes."""

    def __init__(self, folder: Path, bentoml: BentoMl, model_mib: int, name: str = "bench") -> None:
        self._folder, self._bentoml, self._model_mib, self._name = folder, bentoml, model_mib, name
        self._version, self._packages = 0, ["bentoml==1.4.39", "scikit-learn"]
        folder.mkdir()
        self.new_model()

    def new_model(self) -> None:
        """Another model, of which nobody has seen a byte."""
        command = [str(self._bentoml.bin / "python"), "-c", MODEL, f"{self._name}-weights", str(self._model_mib)]
        subprocess.run(command, env=self._bentoml.env, check=True, capture_output=True)

    def new_requirement(self) -> None:
        """One package more."""
        self._packages.append("humanize")

    def bento(self) -> str:
        """The tag of a bento with one more line changed."""
        self._version += 1
        text = SERVICE.format(version=self._version, model=f"{self._name}-weights")
        (self._folder / "service.py").write_text(text)
        packages = json.dumps(self._packages)
        (self._folder / "bentofile.yaml").write_text(
            f"service: service:Bench\nname: {self._name}\ninclude: ['*.py']\n"
            f"python:\n  lock_packages: false\n  packages: {packages}\n"
        )
        version = f"v{self._version}"
        self._bentoml("build", "--version", version, ".", cwd=self._folder)
        return f"{self._name}:{version}"


class Ours:
    """`ekiben images build --push` with a cache of its own."""

    def __init__(self, cache: Path, bentoml: BentoMl, base_name: str, registry: OciRegistry) -> None:
        self._cache, self._base = cache, base_name
        self.env = {**bentoml.env, "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system"}
        self.env["EKIBEN_REGISTRY_INSECURE"] = registry.host

    def build(self, tag: str, output: str) -> None:
        """Build the image of a bento and put it there."""
        command = [str(BIN / "ekiben"), "images", "build", tag, "--base", self._base, "--output", output]
        done = subprocess.run(
            [*command, "--cache", str(self._cache)], env=self.env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")

    def build_here(self, tag: str, output: str) -> None:
        """The same in this process."""
        names = ("BENTOML_HOME", "EKIBEN_BUILDER_PYTHON_PREFERENCE", "EKIBEN_REGISTRY_INSECURE")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update({name: self.env[name] for name in names})
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                asyncio.run(offline.build(tag, base=self._base, output=output, cache=self._cache))
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


class Figures:
    """Wall, CPU, memory and sent bytes, by subject and change."""

    def __init__(self, registry: OciRegistry) -> None:
        self._registry = registry
        self.found: dict[tuple[str, str, str], list[float]] = {}

    def measure(self, who: str, change: str, action: Callable[[], None]) -> None:
        """One run."""
        before, peak = stored(self._registry), Peak(os.getpid())
        own = rss_mib([os.getpid(), self._registry.pid])
        wall_s, used_s = cpu_of(action)
        grown = max(peak.stop() - own, 0)
        sent = (stored(self._registry) - before) / MIB
        for what, value in (("wall", wall_s), ("CPU", used_s), ("memory", grown), ("sent", sent)):
            self.found.setdefault((who, change, what), []).append(value)
        print(
            f"{who}, {change}: {wall_s:.1f} s, CPU {used_s:.1f} s, {grown:.0f} MiB, sent {sent:.2f} MiB",
            file=sys.stderr,
        )


def stored(registry: OciRegistry) -> int:
    """Bytes of all blobs in the registry."""
    return sum(path.stat().st_size for path in registry.folder.rglob("blobs/**/data"))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a round."""
    folder = Path(tempfile.mkdtemp(prefix="ekbench", dir=os.environ.get("TMPDIR", "/tmp")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(figures: Figures, registry: OciRegistry, folder: Path, model_mib: int, sizes: dict[str, float]) -> None:
    """One round of both, change by change."""
    bentoml = BentoMl(client("1.4"), folder / "home")
    base_name = base(folder)
    pushed = f"{registry.host}/{registry.new_repository('base')}:1"
    subprocess.run(["skopeo", "copy", "-q", "--dest-tls-verify=false", base_name, f"docker://{pushed}"], check=True)
    ours = Ours(folder / "cache", bentoml, f"docker://{pushed}", registry)
    peer = Buildah(folder / "buildah", bentoml, base_name)
    repositories = {who: f"{registry.host}/{registry.new_repository(who)}" for who in ("ours", "buildah")}
    project = Project(folder / "project", bentoml, model_mib)
    try:
        tag = project.bento()
        for change in CHANGES:
            if change == "another model":
                project.new_model()
            if change == "one more requirement":
                project.new_requirement()
            if change not in ("cold", "nothing changed"):
                tag = project.bento()
            names = {who: f"{name}:{tag.partition(':')[2]}" for who, name in repositories.items()}
            figures.measure("ours", change, lambda tag=tag, names=names: ours.build(tag, f"docker://{names['ours']}"))
            figures.measure("buildah", change, lambda tag=tag, names=names: peer.build(tag, names["buildah"]))
            if change == "one source line":
                ours.build_here(tag, f"docker://{names['ours']}")  # what Python does once
                tag = project.bento()
                names["ours"] = f"{repositories['ours']}:{tag.partition(':')[2]}"
                figures.measure(
                    "here", change, lambda tag=tag, names=names: ours.build_here(tag, f"docker://{names['ours']}")
                )
        sizes |= {who: size_mib(names[who], bentoml.env) for who in ("ours", "buildah")}
    finally:
        peer.close()


def large(table: Table, gib: float) -> None:
    """A large model: its layer made and kept on disk, and the image of another bento with it; then to a registry."""
    with scratch() as folder, run_registry(folder / "registry") as registry:
        bentoml = BentoMl(client("1.4"), folder / "home")
        base_name = base(folder)
        small = Project(folder / "small", bentoml, 16, "small")
        project = Project(folder / "project", bentoml, int(gib * 1024) // 16 * 16, "large")
        ours = Ours(folder / "cache", bentoml, base_name, registry)
        layout = folder / "layout"
        # Whatever is not the model's is there already, here and there.
        for output in (f"oci:{layout}:warm", f"docker://{registry.host}/large:warm"):
            ours.build(small.bento(), output)
        (weights,) = (folder / "home").rglob("large-weights/*/weights.bin")
        size = weights.stat().st_size
        floor = {"hash": rate(size, lambda: hashed(weights)), "disk": rate(size, lambda: copied(weights, folder))}
        figures = Figures(registry)
        tag = project.bento()
        layout = folder / "layout"

        def assemble() -> None:
            command = [str(BIN / "ekiben"), "images", "build", tag, "--base", base_name, "--output", f"oci:{layout}"]
            subprocess.run([*command, "--cache", str(folder / "cache")], env=ours.env, check=True, capture_output=True)

        figures.measure("ours", "first", assemble)
        figures.measure("ours", "again", assemble)
        (first,), (again,) = figures.found["ours", "first", "wall"], figures.found["ours", "again", "wall"]
        speed = size / MIB / (first - again)
        least = min(floor, key=lambda name: floor[name])
        table.add(f"{gib} GiB model assembled (target: 0.8)", [speed], [floor[least]], "MiB/s", f"{least} alone")
        table.note("hash alone, disk alone", f"{floor['hash']:.0f}, {floor['disk']:.0f} MiB/s")
        (memory,) = figures.found["ours", "first", "memory"]
        table.note("memory of it (target: under 300 MiB)", f"{memory:.0f} MiB")
        shutil.rmtree(layout)
        image = f"docker://{registry.host}/large:1"
        figures.measure("ours", "push", lambda: ours.build(tag, image))
        (pushed,), (memory,) = figures.found["ours", "push", "wall"], figures.found["ours", "push", "memory"]
        table.note(f"{gib} GiB model assembled and pushed", f"{pushed:.1f} s, {memory:.0f} MiB of memory")
        tag = project.bento()
        figures.measure("ours", "known", lambda: ours.build(tag, f"docker://{registry.host}/large:2"))
        (wall,), (sent,) = figures.found["ours", "known", "wall"], figures.found["ours", "known", "sent"]
        table.note("another bento with it (target: under 2 s)", f"{wall:.2f} s, {sent * 1024:.0f} KiB sent")


def rate(size: int, action: Callable[[], None]) -> float:
    """MiB/s of the better of two."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        action()
        took.append(time.perf_counter() - began)
    return size / MIB / min(took)


def hashed(path: Path) -> None:
    """Read and hash a file."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def copied(path: Path, folder: Path) -> None:
    """Write a file's bytes so that they last."""
    target = folder / "copied"
    with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as file:
        while chunk := source.read(MIB):
            file.write(chunk)
        os.fsync(file.fileno())
    target.unlink()


def run(rounds: int, model_mib: int = 500, big_gib: float = 5.0) -> None:
    """All of it; the large model once."""
    table, sizes = Table(f"Images of a bento with scikit-learn and a model of {model_mib} MiB"), {}
    with scratch() as top, run_registry(top / "registry") as registry:
        figures = Figures(registry)
        for number in range(rounds):
            (top / str(number)).mkdir()
            compare(figures, registry, top / str(number), model_mib, sizes)
    units = {"wall": "s", "CPU": "s", "memory": "MiB", "sent": "MiB"}
    for change in CHANGES:
        for what, unit in units.items():
            ours, its = figures.found["ours", change, what], figures.found["buildah", change, what]
            table.add(f"{change}, {what}", ours, its, unit, "BentoML's Dockerfile by buildah")
    change = "one source line"
    ours, its = figures.found["here", change, "wall"], figures.found["buildah", change, "wall"]
    table.add(f"{change}, without the start of Python (target: 0.05)", ours, its, "s", "as above")
    if sizes:
        table.add("the image, as it lies in the registry", [sizes["ours"]], [sizes["buildah"]], "MiB", "as above")
    table.print()
    if big_gib:
        rest = Table("An image with a large model")
        large(rest, big_gib)
        rest.print()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model-mib", type=int, default=500)
    parser.add_argument("--big-gib", type=float, default=5.0, help="0 leaves it out")
    given = parser.parse_args()
    run(given.rounds, given.model_mib, given.big_gib)
