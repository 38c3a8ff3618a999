"""(a) Predictions through the data plane, with and without capture, beside nginx, plain Envoy and the replica itself.

The replica is nginx, which answers 1 KiB to whatever it is sent; a real one would hide what the data plane costs. Each
proxy has one worker. Ours is the real gateway: real listeners, trace of each request, captures tailed into the real
recorder. `wrk` sends; the ways alternate within a round, so that a noisy moment falls on all of them.
"""

import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Table, cpu_s, descendants
from services.gateway.envoy import envoy_path
from tests.platform import free_port, http, wait_for

CONNECTIONS = 32
LOADED_S, SINGLE_S = 5, 3
SIZES = {"1 KiB": 1 << 10, "100 KiB": 100 << 10}
ANSWER = "a" * 1024
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass
class Way:
    """One way for a request to take, and what was measured on it: lists with an item a round, by body size."""

    name: str
    port: int
    proxy: int = 0
    """Process that passes the request on; 0 for none."""
    behind: int = 0
    """Process that takes the captures and spans; 0 for none."""
    rps: dict[str, list[float]] = field(default_factory=dict)
    p50: dict[str, list[float]] = field(default_factory=dict)
    p99: dict[str, list[float]] = field(default_factory=dict)
    single: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    cpu_behind: dict[str, list[float]] = field(default_factory=dict)
    captured: int = -1
    """Requests so far of which a capture has to be recorded; negative for none."""
    failed: int = 0
    """Requests that were cut off or not answered with 2xx."""

    def catch_up(self, public: int, count: int) -> None:
        """Wait until `count` more captures are recorded (or dropped): they must not disturb the next way."""
        if self.captured < 0:
            return
        self.captured += count

        def done() -> bool:
            kept = counted(public, "ekiben_captures_(?:recorded|dropped)_total")
            return kept >= self.captured and counted(public, "ekiben_captures_backlog_bytes") == 0

        wait_for("the captures", done, 600)


def wrk(way: Way, script: Path, connections: int, seconds: int) -> tuple[int, float, float, float]:
    """One load: requests, requests per second, p50 and p99 in ms."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", str(script)]
    output = subprocess.run(
        [*command, f"http://127.0.0.1:{way.port}/predict"], capture_output=True, text=True, check=True
    ).stdout
    for counts in re.findall(r"(?:Socket errors|Non-2xx or 3xx responses): (.*)", output):
        way.failed += sum(map(int, re.findall(r"\d+", counts)))

    def latency(share: str) -> float:
        number, unit = re.findall(rf"^ *{share}% +([\d.]+)(us|ms|s|m)\s*$", output, re.MULTILINE)[0]
        return float(number) * _UNITS[unit]

    count = int(re.findall(r"(\d+) requests in", output)[0])
    return count, float(re.findall(r"Requests/sec: +([\d.]+)", output)[0]), latency("50"), latency("99")


@contextlib.contextmanager
def process(command: list[object], url: str) -> Iterator[int]:
    """A server for the length of a `with` block; its process id."""
    # In a session of its own, as the gateway's Envoy has: on a machine that is busy the kernel shares out the cores by
    # session, and a proxy in the same one as wrk would get more of them.
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(url, lambda: http("POST", url, b"x", timeout_s=2).status == 200)
        yield server.pid
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def nginx(folder: Path, name: str, port: int, location: str, upstream: str = "") -> Iterator[int]:
    """An nginx with one worker, either the replica or a plain reverse proxy that keeps its connections."""
    prefix = folder / name
    prefix.mkdir()
    paths = " ".join(f"{kind}_temp_path {prefix};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (prefix / "nginx.conf").write_text(
        f"worker_processes 1; daemon off; pid {prefix}/pid; error_log {prefix}/error.log;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; {paths} client_max_body_size 0; client_body_buffer_size 256k;\n"
        f"keepalive_requests 1000000000; {upstream}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ {location} }} }} }}\n"
    )
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with process(
        [program, "-p", prefix, "-c", prefix / "nginx.conf", "-e", prefix / "error.log"], f"http://127.0.0.1:{port}/"
    ) as pid:
        yield pid


@contextlib.contextmanager
def plain_envoy(folder: Path, port: int, upstream: int) -> Iterator[int]:
    """An Envoy with one worker that only routes: no capture, no log, no trace."""

    def socket(number: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    types = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "plain",
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "replica"}}],
                }
            ]
        },
    }
    endpoint = {"lb_endpoints": [{"endpoint": {"address": socket(upstream)}}]}
    cluster = {
        "name": "replica",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": "replica", "endpoints": [endpoint]},
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    listener = {"name": "plain", "address": socket(port), "filter_chains": [chain]}
    config = folder / "envoy.json"
    config.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))
    command = [envoy_path(), "-c", config, "--concurrency", 1, "--disable-hot-restart", "--log-level", "error"]
    with process(command, f"http://127.0.0.1:{port}/") as pid:
        yield pid


@contextlib.contextmanager
def ours(folder: Path, upstream: int) -> Iterator[tuple[Way, Way, int]]:
    """The way with capture and the one without, through the same Envoy; and the public port."""
    (folder / "ours").mkdir()
    public, captured, bare = free_port(), free_port(), free_port()
    command = [sys.executable, "-m", "benchmarks.plane", folder / "ours", public, f"127.0.0.1:{upstream}"]
    with process([*command, f"{captured}:100", f"{bare}:0"], f"http://127.0.0.1:{captured}/") as pid:
        wait_for("the other port", lambda: http("POST", f"http://127.0.0.1:{bare}/", b"x").status == 200)
        envoy = next(each for each in descendants(pid) if _program(each) == "envoy")
        yield Way("capture on", captured, envoy, pid, captured=0), Way("capture off", bare, envoy, pid), public


def _program(pid: int) -> str:
    return Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]).name


def counted(public: int, metric: str) -> float:
    """A metric of the gateway."""
    page = http("GET", f"http://127.0.0.1:{public}/metrics").body.decode("utf-8", "replace")
    return sum(float(value) for value in re.findall(rf"^{metric}(?:{{[^}}]*}})? ([\d.e+]+)$", page, re.MULTILINE))


def measure(way: Way, size: str, script: Path, public: int) -> None:
    """One round on one way: the load, then one connection; each until the recorder has all."""
    before, behind = cpu_s(descendants(way.proxy)), cpu_s([way.behind])
    count, rps, p50, p99 = wrk(way, script, CONNECTIONS, LOADED_S)
    used = cpu_s(descendants(way.proxy)) - before
    way.catch_up(public, count)
    if way.behind:  # What it recorded late belongs to the same requests.
        way.cpu_behind.setdefault(size, []).append((cpu_s([way.behind]) - behind) / count * 1e6)
    single, _, p50_single, _ = wrk(way, script, 1, SINGLE_S)
    way.catch_up(public, single)
    for figures, value in ((way.rps, rps), (way.p50, p50), (way.p99, p99), (way.single, p50_single)):
        figures.setdefault(size, []).append(value)
    way.cpu.setdefault(size, []).append(used / count * 1e6 if way.proxy else 0.0)


def run(rounds: int) -> None:
    """All ways, one after the other, in each round."""
    if shutil.which("wrk") is None or not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        print("\nThe data plane is not measured: that takes wrk and nginx (`apt-get install wrk nginx-light`).")
        return
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        scripts = {}
        for size, length in SIZES.items():
            scripts[size] = folder / f"{length}.lua"
            scripts[size].write_text(
                'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\n'
                f"wrk.body = '\"' .. string.rep(\"b\", {length - 2}) .. '\"'\n"
            )
        replica, proxy, plain = free_port(), free_port(), free_port()
        answer = f'default_type application/json; return 200 "{ANSWER}";'
        stack.enter_context(nginx(folder, "replica", replica, answer))
        upstream = f"upstream replica {{ server 127.0.0.1:{replica}; keepalive 64; keepalive_requests 1000000000; }}"
        passing = "proxy_pass http://replica; proxy_http_version 1.1; proxy_set_header Connection '';"
        direct = Way("the replica itself", replica)
        beside = Way(
            "nginx, plain reverse proxy", proxy, stack.enter_context(nginx(folder, "proxy", proxy, passing, upstream))
        )
        envoy = Way("plain Envoy", plain, stack.enter_context(plain_envoy(folder, plain, replica)))
        on, off, public = stack.enter_context(ours(folder, replica))
        for _ in range(rounds):
            for size, script in scripts.items():
                for way in (direct, on, envoy, off, beside):
                    measure(way, size, script, public)
        recorded, dropped = (
            counted(public, "ekiben_captures_recorded_total"),
            counted(public, "ekiben_captures_dropped_total"),
        )
    for size in SIZES:
        _print(size, on, off, envoy, beside, direct)
    failed = ", ".join(f"{way.failed} ({way.name})" for way in (direct, on, off, envoy, beside))
    print(f"\nRequests that failed: {failed}.")
    print(f"Captures recorded: {recorded:.0f}; dropped because the recorder was too far behind: {dropped:.0f}.")


def _print(size: str, on: Way, off: Way, envoy: Way, beside: Way, direct: Way) -> None:
    target = {"1 KiB": " (target: at least 0.45 of plain Envoy)"}.get(size, "")
    table = Table(f"Predictions of {size}, {CONNECTIONS} connections")
    for way in (on, off):
        for peer in (envoy, beside, direct):
            wanted = target if way is on and peer is envoy else ""
            table.add(f"{way.name}: throughput{wanted}", way.rps[size], peer.rps[size], "1/s", peer.name)
        for peer in (envoy, beside):
            table.add(f"{way.name}: p50", way.p50[size], peer.p50[size], "ms", peer.name)
            table.add(f"{way.name}: p99", way.p99[size], peer.p99[size], "ms", peer.name)
            table.add(f"{way.name}: CPU per request, proxy", way.cpu[size], peer.cpu[size], "µs", peer.name)
        table.note(f"{way.name}: CPU per request, gateway and recorder", f"{_middle(way.cpu_behind[size]):.0f} µs")
        table.add(f"{way.name}: p50 at one connection", way.single[size], envoy.single[size], "ms", envoy.name)
        for peer in (envoy, direct):
            added = _middle(way.single[size]) - _middle(peer.single[size])
            table.note(
                f"{way.name}: added to the p50 at one connection of {peer.name} (target: at most 1.5 ms)",
                f"{added:.3f} ms",
            )
    table.print()


def _middle(values: list[float]) -> float:
    return statistics.median(values)
