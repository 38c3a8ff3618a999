"""A running Ekiben for tests: the real `ekiben up` in a process of its own, on a fresh data directory and a free port.

Everything goes through what a user has: the `ekiben` command, the unmodified `bentoml` command, HTTP.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, probe: Callable[[], T], timeout_s: float = 30.0) -> T:
    """The first true answer of `probe`, asked again and again; AssertionError names `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if answer := probe():
                return answer
            last = answer
        except (AssertionError, OSError, urllib.error.URLError, subprocess.SubprocessError) as exc:
            last = exc
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {timeout_s} s; last: {last!r}")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def http(
    method: str,
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
) -> Answer:
    """One HTTP call; an error status is an answer, not an exception."""
    request = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return Answer(response.status, dict(response.headers), response.read())
    except urllib.error.HTTPError as exc:
        return Answer(exc.code, dict(exc.headers), exc.read())


def process_tree_of(mark: str) -> list[int]:
    """Every living process whose command line or environment holds `mark`: nothing may be left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            if mark.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@dataclass
class Platform:
    """One `ekiben up` and the commands that speak to it."""

    data: Path
    port: int = field(default_factory=free_port)
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """The admin's API token."""
        return (self.data / "admin-token").read_text().strip()

    @property
    def output(self) -> str:
        """All that `ekiben up` printed so far."""
        return self.data.with_suffix(".log").read_text(errors="replace")

    def start(self, timeout_s: float = 60.0) -> "Platform":
        """Run `ekiben up` and wait until it is ready."""
        with self.data.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "ekiben", "up", "--data", self.data, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | self.env,
                start_new_session=True,
            )

        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"`ekiben up` ended with {self.process.returncode}:\n{self.output[-4000:]}")
            return http("GET", f"{self.url}/readyz", timeout_s=5).status == 200

        wait_for(f"{self.url}/readyz", ready, timeout_s)
        return self

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ctrl-C, as a person would; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout_s)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL, which nothing can prepare for."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End it, whatever it takes, and whatever it left."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        self.kill()
        for pid in process_tree_of(str(self.data)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def client_env(self) -> dict[str, str]:
        """What the `ekiben` command needs to find the server."""
        return os.environ | {"EKIBEN_ENDPOINT": self.url, "EKIBEN_API_TOKEN": self.token, "NO_COLOR": "1"}

    def ekiben(self, *arguments: str, check: bool = True, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run the `ekiben` command."""
        return run([str(BIN / "ekiben"), *arguments], env=self.client_env(), check=check, timeout_s=timeout_s)

    def ekiben_json(self, *arguments: str) -> Any:
        """Run the `ekiben` command with `-o json` and parse what it printed."""
        return json.loads(self.ekiben(*arguments, "-o", "json").stdout)

    def api(self, method: str, path: str, body: object = None, token: str | None = None) -> Answer:
        """One call of the HTTP/JSON API."""
        return http(
            method,
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"authorization": f"Bearer {self.token if token is None else token}", "content-type": "application/json"},
        )


def run(
    command: list[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    check: bool = True,
    timeout_s: float = 180.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a failure shows what it printed."""
    done = subprocess.run(
        command, env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@dataclass(frozen=True)
class BentoMl:
    """The unmodified `bentoml` command of one version, logged in to one platform."""

    bin: Path
    home: Path

    @property
    def env(self) -> dict[str, str]:
        """Its environment: a store of its own, no telemetry, nothing of pytest's."""
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "BENTOML_HOME": str(self.home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "LANG": "C.UTF-8",
            **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))},
        }

    def __call__(
        self, *arguments: str, cwd: Path | None = None, check: bool = True, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run it."""
        return run([str(self.bin / "bentoml"), *arguments], env=self.env, cwd=cwd, check=check, timeout_s=timeout_s)

    def login(self, platform: Platform) -> "BentoMl":
        """Log in as a user would."""
        self("cloud", "login", "--endpoint", platform.url, "--api-token", platform.token)
        return self


@contextlib.contextmanager
def running(data: Path, **settings: Any) -> Iterator[Platform]:
    """A platform for the length of a `with` block."""
    platform = Platform(data, **settings)
    try:
        yield platform.start()
    finally:
        platform.close()
