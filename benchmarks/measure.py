"""CPU, memory and time of process trees, and a table of figures beside their peers."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """`pid` and every living process below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo[-1])
        todo.extend(children.get(todo.pop(), []))
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, of these processes so far."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def rss_mib(pids: Iterable[int], *, peak: bool = False) -> float:
    """Resident memory of these processes now, or the sum of each one's peak, in MiB."""
    key, total = ("VmHWM:" if peak else "VmRSS:"), 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(key):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


def cpu_of(action: Callable[[], object], pid: int = 0) -> tuple[float, float]:
    """Wall and CPU seconds of `action`: of this process, of its children that have ended, and of the tree of `pid`."""

    def so_far() -> float:
        own = os.times()
        return own.user + own.system + own.children_user + own.children_system + (cpu_s(descendants(pid)) if pid else 0)

    cpu, began = so_far(), time.perf_counter()
    action()
    return time.perf_counter() - began, so_far() - cpu


def timed(action: Callable[[], object]) -> float:
    """Wall seconds that `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@dataclass
class Table:
    """Figures of one benchmark: a row each, its peer's figure beside it, and the ratio of the medians."""

    title: str
    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def add(self, what: str, ours: list[float], peer: list[float], unit: str, peer_name: str) -> float:
        """Add a row; gives ours / peer's."""
        mine, its = statistics.median(ours), statistics.median(peer)
        ratio = mine / its if its else float("inf")
        self.rows.append((what, f"{mine:.4g} {unit}", f"{its:.4g} {unit}", f"{ratio:.2f}", peer_name))
        return ratio

    def note(self, what: str, value: str) -> None:
        """Add a figure without a peer."""
        self.rows.append((what, value, "", "", ""))

    def print(self) -> None:
        """Print it as Markdown."""
        print(f"\n### {self.title}\n\n| what | Ekiben | peer | ratio | the peer |\n|---|---|---|---|---|")
        for row in self.rows:
            print("| " + " | ".join(row) + " |", flush=True)
