"""Trees of processes: whatever is killed, nothing lives on unnoticed."""

import asyncio
import os
import re
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.kernel import processes, shim
from services.kernel.processes import ProcessSpec, SupervisedProcess

# A main process, and a worker in a session of its own which ignores SIGTERM, as BentoML's do.
TREE = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(1, f"worker {os.getpid()}\\n".encode())
        time.sleep(600)
    os._exit(0)
os.write(1, f"main {os.getpid()}\\n".encode())
time.sleep(600)
"""


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    return shim.start_ticks(pid) != 0 and not shim.is_zombie(pid)


@pytest.fixture
async def run_dir(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    folder = tmp_path_factory.mktemp("p")
    yield folder
    for process in await processes.adopt(folder / "state"):
        await process.kill()
    await processes.end_strays(processes.mark_of("test", folder))


def spec(run_dir: Path, program: str, id: str = "one", **changes: object) -> ProcessSpec:
    fields: dict[str, object] = {
        "id": id,
        "argv": [sys.executable, "-u", "-c", textwrap.dedent(program)],
        "env": {"PATH": os.environ["PATH"], "SECRET": "hush"},
        "cwd": run_dir,
        "log_file": run_dir / f"{id}.log",
        "mark": processes.mark_of("test", run_dir),
        "stop_grace_s": 0.5,
        "orphan_grace_s": 0.5,
    }
    return ProcessSpec(**{**fields, **changes})  # type: ignore[arg-type]


async def start(run_dir: Path, program: str, **changes: object) -> SupervisedProcess:
    return await processes.start(spec(run_dir, program, **changes), run_dir / "state")


async def pids_of_tree(run_dir: Path, id: str = "one") -> list[int]:
    log = run_dir / f"{id}.log"

    def found() -> list[int]:
        return [int(pid) for pid in re.findall(r"(?:main|worker) (\d+)", log.read_text() if log.exists() else "")]

    await until(lambda: len(found()) == 2)
    return found()


async def test_an_exit_code_and_the_log_with_times_are_kept(run_dir: Path) -> None:
    process = await start(run_dir, "import sys; print('hello'); print('no end', end=''); sys.exit(3)")
    assert await process.wait() == 3
    lines = (run_dir / "one.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["hello", "no end"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ", line) for line in lines)
    assert list((run_dir / "state").iterdir()) == []


async def test_the_environment_is_the_given_one_and_the_mark(run_dir: Path) -> None:
    process = await start(run_dir, "import os; print(sorted(set(os.environ) - {'LC_CTYPE'}))")
    assert await process.wait() == 0
    assert "['EKIBEN_PROCESS', 'PATH', 'SECRET']" in (run_dir / "one.log").read_text()


async def test_no_secret_is_written_to_the_state(run_dir: Path) -> None:
    process = await start(run_dir, TREE)
    await pids_of_tree(run_dir)
    assert not any("hush" in file.read_text() for file in (run_dir / "state").glob("*.json"))
    assert b"hush" not in Path(f"/proc/{process.shim_pid}/environ").read_bytes()
    assert b"hush" not in Path(f"/proc/{process.shim_pid}/cmdline").read_bytes()
    await process.kill()


async def test_what_cannot_be_started_says_why(run_dir: Path) -> None:
    with pytest.raises(FailedPrecondition, match="No such file") as caught:
        await start(run_dir, "", argv=["/no/such/program"])
    assert caught.value.reason == "PROCESS_NOT_STARTED"
    assert list((run_dir / "state").iterdir()) == []


async def test_stop_ends_a_worker_which_left_its_session_and_ignores_sigterm(run_dir: Path) -> None:
    process = await start(run_dir, TREE)
    pids = await pids_of_tree(run_dir)
    assert await process.stop() == -signal.SIGTERM
    assert not any(map(alive, pids))


async def test_the_rest_ends_when_the_main_process_is_killed(run_dir: Path) -> None:
    process = await start(run_dir, TREE)
    pids = await pids_of_tree(run_dir)
    os.kill(process.pid, signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL
    assert not any(map(alive, pids))


async def test_killing_the_shim_leaves_nothing(run_dir: Path) -> None:
    process = await start(run_dir, TREE)
    pids = await pids_of_tree(run_dir)
    os.kill(process.shim_pid, signal.SIGKILL)
    assert await process.wait() == processes.LOST
    assert not any(map(alive, pids))


THREADS = """
import socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
memory = bytearray(256 << 20)
memory[:: 4096] = bytes(len(memory) // 4096)
for _ in range(30):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("port", listener.getsockname()[1])
time.sleep(60)
"""
"""The more memory and threads, the longer a killed process keeps its port, though its main thread is a zombie."""


@pytest.mark.parametrize("how", ["shim", "stray", "kill"])
async def test_who_waits_for_the_end_of_a_tree_can_have_its_port(run_dir: Path, how: str) -> None:
    process = await start(run_dir, THREADS)
    log = run_dir / "one.log"
    await until(lambda: "port" in log.read_text())
    if how == "shim":
        os.kill(process.shim_pid, signal.SIGKILL)
        await process.wait()
    elif how == "stray":
        process.detach()
        await processes.end_strays(process.mark)
    else:
        await process.kill()
    socket.create_server(("127.0.0.1", int(log.read_text().split()[-1]))).close()


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_shim_that_hangs_keeps_nothing_alive(run_dir: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SHIM_LATE_S", 0.5)
    process = await start(run_dir, TREE)
    pids = [*await pids_of_tree(run_dir), process.shim_pid]
    os.kill(process.shim_pid, signal.SIGSTOP)
    async with asyncio.timeout(20):
        await (process.stop(0.1) if how == "stop" else process.kill())
    assert process.returncode == processes.LOST
    assert not any(map(alive, pids))


async def test_strays_of_a_dead_owner_and_a_dead_shim_are_ended(run_dir: Path) -> None:
    process = await start(run_dir, TREE)
    pids = await pids_of_tree(run_dir)
    process.detach()
    os.kill(process.shim_pid, signal.SIGKILL)
    await until(lambda: not alive(process.shim_pid))
    mark = processes.mark_of("test", run_dir)
    assert await processes.end_strays(mark, keep=["one"]) == 0
    assert await processes.adopt(run_dir / "state") == []
    await processes.end_strays(mark)
    assert not any(map(alive, pids))
    assert list((run_dir / "state").iterdir()) == []


@pytest.mark.parametrize("lost", ["state", "socket", "hang"])
async def test_a_living_shim_that_cannot_be_adopted_is_ended_at_once(
    run_dir: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 2.0)
    process = await start(run_dir, TREE, orphan_grace_s=120.0)
    pids = [*await pids_of_tree(run_dir), process.shim_pid]
    process.detach()
    if lost == "hang":
        os.kill(process.shim_pid, signal.SIGSTOP)
    else:
        (run_dir / "state" / f"one.{'json' if lost == 'state' else 'sock'}").unlink()
    assert await processes.adopt(run_dir / "state") == []
    assert await processes.end_strays(processes.mark_of("test", run_dir)) > 0
    assert not any(map(alive, pids))


async def test_a_new_owner_adopts_and_stops_a_tree(run_dir: Path) -> None:
    process = await start(run_dir, TREE, orphan_grace_s=20.0)
    pids = await pids_of_tree(run_dir)
    process.detach()
    (adopted,) = await processes.adopt(run_dir / "state")
    assert await processes.end_strays(processes.mark_of("test", run_dir), keep=["one"]) == 0
    assert (adopted.id, adopted.pid, adopted.shim_pid) == (process.id, process.pid, process.shim_pid)
    assert await adopted.stop() == -signal.SIGTERM
    assert not any(map(alive, pids))


async def test_a_tree_without_an_owner_ends_after_its_grace(run_dir: Path) -> None:
    process = await start(run_dir, TREE, orphan_grace_s=0.2)
    pids = await pids_of_tree(run_dir)
    process.detach()
    await until(lambda: not any(map(alive, [*pids, process.shim_pid])))
    assert "nobody owns this process" in (run_dir / "one.log").read_text()


async def test_full_logs_are_rotated_and_the_oldest_is_dropped(run_dir: Path) -> None:
    program = "import time\nfor n in range(200): print(n, 'x' * 90, flush=True)\n"
    process = await start(run_dir, program, log_max_bytes=4000, log_keep=2)
    assert await process.wait() == 0
    files = sorted(run_dir.glob("one.log*"))
    assert [file.name for file in files] == ["one.log", "one.log.1", "one.log.2"]
    newest = [line.split()[1] for file in reversed(files) for line in file.read_text().splitlines()]
    assert newest == [str(n) for n in range(200 - len(newest), 200)]


async def test_a_log_that_cannot_be_written_does_not_stop_the_program(run_dir: Path) -> None:
    (run_dir / "one.log").symlink_to("/dev/full")
    process = await start(run_dir, "for n in range(1000): print('x' * 100)")
    assert await process.wait() == 0


async def test_a_memory_limit_ends_the_tree_or_is_said_to_be_missing(run_dir: Path) -> None:
    process = await start(
        run_dir, "print('start'); b = bytearray(200 << 20); print(len(b))", memory_limit_bytes=64 << 20
    )
    code = await process.wait()
    if process.note:
        assert "no limit of memory" in process.note
    else:
        assert code == -signal.SIGKILL
        assert process.out_of_memory


async def test_a_path_too_long_for_a_socket_is_said(run_dir: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await processes.start(spec(run_dir, ""), run_dir / ("x" * 120))
    assert caught.value.reason == "PATH_TOO_LONG"
