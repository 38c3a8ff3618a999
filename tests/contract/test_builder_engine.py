"""Commands run in images by a real engine: what they leave, what is remembered, and that nothing else stays."""

import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import DeadlineExceeded, EkibenError, FailedPrecondition, ResourceExhausted
from services.builder.buildah import BuildahEngine
from services.builder.commands import Script
from services.builder.containerfiles import with_secrets
from services.builder.engine import Order, Outcome, Secret
from services.builder.executions import Executions
from services.builder.images import Layer
from services.builder.uv import Programs
from services.content.images import Image, Platform
from services.content.images.layout import LayoutImageStore
from tests.platform import wait_for
from tests.shell_base import shell_base

HOME = "/root"
"""Of root, in an image."""

Base = tuple[LayoutImageStore, Image]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    if os.getuid() != 0:
        pytest.skip("the engine is tested as root: CI is, and a user namespace needs ranges in /etc/subuid")
    return shell_base(tmp_path_factory.mktemp("shell") / "base")


@dataclass
class Counting:
    """The engine, and how often it ran."""

    engine: BuildahEngine
    runs: int = 0

    def check(self, platforms: Sequence[Platform] = ()) -> None:
        self.engine.check(platforms)

    @contextlib.asynccontextmanager
    async def run(self, order: Order, say: Callable[[str], None]) -> AsyncIterator[Outcome]:
        self.runs += 1
        async with self.engine.run(order, say) as outcome:
            yield outcome


@dataclass
class Bench:
    """A place to run commands in."""

    folder: Path
    base: Base
    timeout_s: float = 120.0
    lines: list[str] = field(default_factory=list)
    on_line: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        (self.folder / "r").mkdir(parents=True)
        (self.folder / "context").mkdir()
        programs = Programs(self.folder, self.folder / "r")
        self.engine = Counting(BuildahEngine(self.folder / "engine", programs, timeout_s=self.timeout_s))

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.on_line(line)

    def order(self, *commands: str, secrets: tuple[Secret, ...] = (), **changes: Any) -> Order:
        names = [each.name for each in secrets]
        script = Script(tuple(f"RUN {with_secrets(each, names)}" for each in commands))
        order = Order(self.base[1], self.base[0], script, self.folder / "context", secrets)
        return replace(order, **changes)

    def executions(self, *, again: bool = False) -> Executions:
        return Executions(self.folder / "executed", self.engine, self.say, again=again)

    def execute(self, order: Order) -> list[Layer]:
        return asyncio.run(self.executions().execute(order, "commands"))[0]

    def members(self, layer: Layer) -> dict[str, tarfile.TarInfo]:
        path = self.folder / "executed" / "layers" / "blobs" / "sha256" / layer.descriptor.digest.hex
        with tarfile.open(path) as archive:
            return {each.name: each for each in archive}

    def assert_nothing_is_left(self) -> None:
        """No mount, no container, no file of an execution, no process."""
        root = self.folder / "engine" / "storage-0" / "root"
        assert [path for path in root.glob("*-containers/*") if path.is_dir()] == []
        mounts = Path("/proc/self/mountinfo").read_text()
        assert str(self.folder) not in mounts
        assert not list((self.folder / "engine").glob("storage-*/work"))
        wait_for("the end of its processes", lambda: not _processes_of(self.folder), 30)


def _processes_of(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{folder}/engine".encode() in (path / "cmdline").read_bytes():
                found.append(path.name)
    return found


@pytest.fixture
def bench(tmp_path: Path, base: Base) -> Bench:
    return Bench(tmp_path / "a", base)


def test_a_layer_holds_what_commands_did_and_not_when(bench: Bench, base: Base, tmp_path: Path) -> None:
    commands = (
        "mkdir /opt/z && echo one > /opt/z/b && ln /opt/z/b /opt/z/a && ln -s b /opt/z/c && chmod 4750 /opt/z/b",
        "rm /etc/old && mkdir -p /var/cache/apt /var/log && touch /var/cache/apt/x /var/log/dpkg.log /opt/kept",
        f"mkdir -p {HOME}/.cache/uv && echo linked > {HOME}/.cache/uv/x && ln {HOME}/.cache/uv/x /opt/x",
    )
    (layer,) = bench.execute(bench.order(*commands))
    there = bench.members(layer)
    assert there["opt/z/a"].isreg() and there["opt/z/b"].linkname == "opt/z/a", "the first of two names has the content"
    assert there["opt/z/a"].mode == 0o4750 and there["opt/z/c"].linkname == "b"
    assert "etc/.wh.old" in there and "opt/kept" in there
    assert there["opt/x"].isreg() and there["opt/x"].size == 7, "it was linked out of a cache that is left out"
    assert not {"var/cache/apt/x", "var/log/dpkg.log", "etc/hosts", "etc/resolv.conf", "run/secrets"} & set(there)
    assert {each.mtime for each in there.values()} == {0}
    bench.assert_nothing_is_left()
    old_umask = os.umask(0o077)
    try:
        (again,) = Bench(tmp_path / "of another name", base).execute(bench.order(*commands))
    finally:
        os.umask(old_umask)
    assert again == layer


def test_what_ran_is_not_run_again_until_something_that_it_depends_on_changes(bench: Bench) -> None:
    (bench.folder / "context" / "file").write_text("one")
    script = Script(("COPY file /opt/file", "RUN cat /opt/file"), files=("file",))
    order = bench.order(script=script, secrets=(Secret("A", "aaaaaaaaaa", "1"),))

    def ran(order: Order) -> int:
        before = bench.engine.runs
        bench.execute(order)
        return bench.engine.runs - before

    assert [ran(order), ran(order)] == [1, 0]
    assert ran(replace(order, secrets=(Secret("A", "bbbbbbbbbb", "1"),))) == 0, "the version of a secret counts"
    assert ran(replace(order, secrets=(Secret("A", "aaaaaaaaaa", "2"),))) == 1
    (bench.folder / "context" / "file").write_text("two")
    assert ran(order) == 1
    asyncio.run(bench.executions(again=True).execute(order, "commands"))
    assert bench.engine.runs == 4
    shutil.rmtree(bench.folder / "executed" / "layers")
    assert ran(order) == 1, "a layer that was lost is made again"


def test_what_is_copied_has_the_same_modes_whatever_umask_the_bento_has(base: Base, tmp_path: Path) -> None:
    listing = "RUN --mount=target=/r ls -l --time-style=+untimed /r/src > /opt/listed"
    script = Script(("COPY file run /opt/", "COPY src /opt/src", listing))
    made = []
    for number, (file, run, folder) in enumerate(
        [(0o644, 0o755, 0o755), (0o600, 0o700, 0o700), (0o664, 0o775, 0o2775)]
    ):
        bench = Bench(tmp_path / str(number), base)
        context = bench.folder / "context"
        (context / "src").mkdir()
        (context / "src" / "link").symlink_to("in")
        for name, mode in (("file", file), ("run", run), ("src/in", file)):
            (context / name).write_text(name)
            (context / name).chmod(mode)
        (context / "src").chmod(folder)
        old_umask = os.umask(0o777 & ~folder)
        try:
            (layer,) = bench.execute(bench.order(script=replace(script, files=(".",))))
            named = replace(script, instructions=script.instructions[:2], files=("file", "run", "src"))
            made.append((layer, *bench.execute(bench.order(script=named))))
        finally:
            os.umask(old_umask)
        there = bench.members(layer)
        modes = {name: there[f"opt/{name}"].mode for name in ("file", "run", "src", "src/in")}
        assert modes == {"file": 0o644, "run": 0o755, "src": 0o755, "src/in": 0o644}
        assert there["opt/src/link"].linkname == "in"
    assert made[0] == made[1] == made[2]


def test_folders_are_seen_by_commands_and_are_in_no_layer(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("heavy\n")
    folders = {"/home/models/m": lambda: contextlib.nullcontext(tmp_path)}
    order = bench.order("cat /home/models/m/weights > /opt/copy; ! touch /home/models/m/new", folders=folders)
    (layer,) = bench.execute(order)
    there = bench.members(layer)
    assert there["opt/copy"].size == 6 and not [name for name in there if name.startswith("home/models/m")]
    assert not (tmp_path / "new").exists()


def test_what_nobody_used_for_long_goes(bench: Bench) -> None:
    (old,) = bench.execute(bench.order("touch /opt/old"))
    (used,) = bench.execute(bench.order("touch /opt/used"))
    for file in (bench.folder / "executed").rglob("*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    bench.execute(bench.order("touch /opt/used"))
    bench.execute(bench.order("touch /opt/new"))
    blobs = {path.name for path in (bench.folder / "executed" / "layers" / "blobs" / "sha256").iterdir()}
    assert used.descriptor.digest.hex in blobs and old.descriptor.digest.hex not in blobs
    before = bench.engine.runs
    bench.execute(bench.order("touch /opt/old"))
    assert bench.engine.runs == before + 1
    for number in range(5):  # each on an image of its own
        config = {**bench.base[1].config, "config": {"Env": [f"N={number}"]}}
        image = replace(bench.base[1], config=config)
        bench.execute(bench.order("touch /opt/it", image=image))
    storage = bench.folder / "engine" / "storage-0"
    kept = ["buildah", "--root", str(storage / "root"), "--runroot", str(storage / "run"), "images", "--quiet", "--all"]
    listed = subprocess.run(kept, capture_output=True, text=True, check=True).stdout.split()
    assert len(set(listed)) == 4


def test_secrets_reach_commands_and_nothing_else(bench: Bench) -> None:
    secret = Secret("TOKEN", "correct-horse-battery")
    (layer,) = bench.execute(bench.order('echo "have $TOKEN"; echo ${#TOKEN} > /opt/length', secrets=(secret,)))
    assert "opt/length" in bench.members(layer) and bench.members(layer)["opt/length"].size == 3
    assert "have …" in bench.lines
    assert not [line for line in bench.lines if secret.value in line or "/run/secrets" in line]
    kept = [path for path in bench.folder.rglob("*") if path.is_file() and secret.value.encode() in path.read_bytes()]
    assert kept == []
    other = replace(secret, value="another-horse-battery")
    bench.execute(bench.order('echo "have $TOKEN"; echo ${#TOKEN} > /opt/length', secrets=(other,)))
    assert bench.engine.runs == 2, "without a version another value counts"


def test_a_secret_that_commands_leave_behind_is_refused(bench: Bench) -> None:
    secret = Secret("TOKEN", "correct-horse-battery")
    with pytest.raises(FailedPrecondition) as caught:
        bench.execute(bench.order(f"mkdir -p {HOME}; echo token=$TOKEN > {HOME}/.netrc", secrets=(secret,)))
    assert caught.value.reason == "SECRET_IN_IMAGE" and f"{HOME}/.netrc" in caught.value.message
    assert secret.value not in caught.value.message
    kept = [path for path in bench.folder.rglob("*") if path.is_file() and secret.value.encode() in path.read_bytes()]
    assert kept == []
    bench.assert_nothing_is_left()


def test_a_secret_in_the_images_configuration_is_refused(bench: Bench) -> None:
    secret = Secret("TOKEN", 'correct-"horse"-battery\n')
    script = Script(("""ENV KEPT='correct-"horse"-battery'""",), configures=True)
    with pytest.raises(FailedPrecondition) as caught:
        bench.execute(bench.order(script=script, secrets=(secret,)))
    assert caught.value.reason == "SECRET_IN_IMAGE" and "configuration" in caught.value.message


def test_a_command_that_fails_is_named_with_what_it_said(bench: Bench) -> None:
    secret = Secret("TOKEN", "correct-horse-battery")
    with pytest.raises(FailedPrecondition) as caught:
        bench.execute(bench.order("echo fine", "echo broken $TOKEN >&2; exit 42", secrets=(secret,)))
    assert caught.value.reason == "COMMAND_FAILED" and caught.value.metadata["exit_code"] == "42"
    assert caught.value.metadata["command"] == "echo broken $TOKEN >&2; exit 42"
    assert caught.value.message.endswith("\nbroken …") and "fine" not in caught.value.message
    with pytest.raises(FailedPrecondition) as caught:
        bench.execute(bench.order(script=Script(("NONSENSE",))))
    assert caught.value.reason == "ENGINE_FAILED" and "NONSENSE" in caught.value.message.upper()
    bench.assert_nothing_is_left()


def test_cancelling_ends_every_process_and_mount(bench: Bench) -> None:
    async def cancel() -> None:
        started = asyncio.Event()
        bench.on_line = lambda line: started.set() if line == "started" else None
        order = bench.order("sh -c 'sleep 987654 & sleep 987653' & echo started; sleep 987652")
        running = asyncio.ensure_future(bench.executions().execute(order, "commands"))
        async with asyncio.timeout(120):
            await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in shown.splitlines() if line.startswith("sleep 98765")]
    bench.assert_nothing_is_left()


def test_commands_have_a_time_limit(base: Base, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a", base, timeout_s=0.01)
    with pytest.raises(DeadlineExceeded) as caught:
        bench.execute(bench.order("sleep 987651"))
    assert caught.value.reason == "COMMANDS_TIMEOUT"
    bench.assert_nothing_is_left()


_KILLED = """
import asyncio, pickle, sys
from pathlib import Path
from services.builder.buildah import BuildahEngine
from services.builder.executions import Executions
from services.builder.uv import Programs

folder = Path(sys.argv[1])
order = pickle.loads((folder / "order").read_bytes())
engine = BuildahEngine(folder / "engine", Programs(folder, folder / "r"))
say = lambda line: print(line, flush=True)
asyncio.run(Executions(folder / "executed", engine, say).execute(order, "commands"))
"""


def test_what_a_killed_engine_left_goes_before_the_next(bench: Bench, base: Base, tmp_path: Path) -> None:
    (bench.folder / "context" / "wait").write_text("")
    secret = Secret("TOKEN", "hunter2-hunter2-of-the-killed")
    order = bench.order("touch /opt/made; while [ -s /home/wait ]; do echo waiting; sleep 1; done", secrets=(secret,))
    script = Script(("COPY wait /home/wait", *order.script.instructions), files=("wait",))
    order = replace(order, script=script)
    (bench.folder / "context" / "wait").write_text("yes")
    (bench.folder / "order").write_bytes(pickle.dumps(order))
    killed = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(bench.folder)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert killed.stdout is not None
    while (line := killed.stdout.readline()) and "waiting" not in line:
        pass
    assert line, "it ended before it was killed"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for("the end of its processes", lambda: not _processes_of(bench.folder), 60)
    assert _holds(bench.folder / "engine", secret.value)
    asyncio.run(bench.engine.engine.sweep())  # as a builder does when it starts, whether anything is built or not
    bench.assert_nothing_is_left()
    assert not _holds(bench.folder / "engine", secret.value)
    (bench.folder / "context" / "wait").write_text("")
    (layer,) = bench.execute(order)
    bench.assert_nothing_is_left()
    other = Bench(tmp_path / "b", base)
    (other.folder / "context" / "wait").write_text("")
    assert other.execute(replace(order, context=other.folder / "context")) == [layer]


def _holds(folder: Path, text: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if text.encode() in path.read_bytes()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_said_and_leaves_nothing(base: Base, small_disk: Path) -> None:
    bench = Bench(small_disk / "a", base)
    with pytest.raises(ResourceExhausted) as caught:
        bench.execute(bench.order("dd if=/dev/zero of=/opt/large bs=1M count=64"))
    assert caught.value.reason == "STORAGE_FULL"
    (layer,) = bench.execute(bench.order("touch /opt/small"))
    assert "opt/small" in bench.members(layer)


def test_without_the_engine_or_for_another_platform_it_is_said_what_to_do(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(order: Order) -> EkibenError:
        with pytest.raises(FailedPrecondition) as caught:
            bench.execute(order)
        return caught.value

    strange = replace(bench.base[1], config={**bench.base[1].config, "architecture": "s390x"})
    assert reason(bench.order("true", image=strange)).reason == "PLATFORM_NOT_EXECUTABLE"
    with pytest.raises(FailedPrecondition, match="no path of an overlay has a colon"):
        BuildahEngine(Path("/srv/a:b"), Programs(bench.folder, bench.folder / "r")).check()
    monkeypatch.setenv("PATH", "/nowhere")
    error = reason(bench.order("true"))
    assert error.reason == "ENGINE_MISSING" and "apt-get install buildah" in error.message
