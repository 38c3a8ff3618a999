"""What tests do with a platform that they hurt."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from services.kernel import processes as trees
from tests.platform import Platform, http, process_tree_of, wait_for

BENTOS = Path(__file__).resolve().parent / "bentos"
JSON = {"content-type": "application/json"}


def answers(url: str) -> bool:
    """Whether the deployment serves a prediction now."""
    return http("POST", f"{url}/version", b"{}", JSON, timeout_s=10).status == 200


def predict(url: str) -> str:
    """Make a prediction, which is answered; its trace."""
    trace = f"7{time.time_ns():031x}"[:32]
    assert http("POST", f"{url}/version", b"{}", JSON | {"traceparent": f"00-{trace}-{1:016x}-01"}).status == 200
    return trace


def recorded(platform: Platform, trace: str) -> bool:
    """Whether the prediction of a trace is in the log, where it must not be twice."""
    rows = platform.ekiben_json("predictions", "list", "--trace", trace)
    assert len(rows) < 2, rows
    return bool(rows)


def everything_of(platform: Platform) -> dict[int, str]:
    """Command lines of all that lives and belongs to a platform: by its data directory, and by the marks of its trees."""
    data = platform.data.resolve()
    found = set(process_tree_of(str(data)))
    marks = {trees.mark_of(owner, data / owner) for owner in ("gateway", "deployer", "builder")}
    for variable in (trees.MARK, trees.SHIM_MARK):
        found.update(pid for pid, mark, _ in trees._marked(variable) if mark in marks)
    lines = {}
    for pid in found:
        with contextlib.suppress(OSError):
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {pid: line for pid, line in lines.items() if line}


def processes(platform: Platform, *words: str) -> list[int]:
    """Processes of this platform with all `words` in their command line."""
    return [pid for pid, line in everything_of(platform).items() if all(word in line for word in words)]


def kill_everything(platform: Platform) -> None:
    """As a machine that loses its power: no process is left."""
    platform.kill()

    def none_left() -> bool:
        for pid in everything_of(platform):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not everything_of(platform)

    wait_for("no process", none_left, 20)


def state(platform: Platform, deployment: str) -> str:
    """The deployment's state now."""
    return str(platform.ekiben_json("deployments", "get", deployment)["state"])


def replicas(platform: Platform, deployment: str) -> list[dict[str, Any]]:
    """The deployment's replicas now."""
    found: list[dict[str, Any]] = platform.ekiben_json("deployments", "replicas", deployment)
    return found
