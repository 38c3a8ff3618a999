"""Starts BentoML's server for one replica, on a Unix socket. Runs in the bento's environment, not in the suite's.

Usage: `python launcher.py SOCKET CONTROL_DIR COMMAND ARGUMENT…`. The command is `serve`, with the arguments of
`bentoml serve` (a bento made before 1.2, as a whole), or `start-http-server`, with its (one service of a later bento).

BentoML listens on TCP only, and an inter-service port unpickles what it is sent. Both its supervisor (circus, in all
versions from 1.0 to 1.4) and its workers are indifferent to the family of the socket, so this changes what the
supervisor opens:
- the server's socket becomes a Unix socket;
- circus's control endpoints, two TCP ports that accept commands from anybody, become Unix sockets too; this also ends
  the race between replicas that start together for the ports which BentoML found free;
- a dead worker is noticed after one second instead of ten. One of several is replaced; the only one is not, nor is one
  that died young, for then the supervisor ends, and whoever started it sees that, waits, and starts it again.
As the first process of a container it ends when nobody reads what it prints: then its shim was killed. And its status
says where the kernel ended a process for its memory: the control group that knows it is gone with the container.
A dependency's own `envs` are put in, which BentoML does only when it starts the whole bento itself.
Workers are started by `worker.py`, beside this file. Calls to other services keep their connections.

Standard library only, and Python 3.7: bentos bring old environments.
"""

# mypy: ignore-errors
# ruff: noqa: PTH118, UP031, SIM105

import importlib.util
import json
import os
import select
import sys
import threading
from pathlib import Path

CHECK_DELAY_S = 1.0
YOUNG_S = 30.0
OUT_OF_MEMORY = 247
"""Status of a container whose memory was not enough. Others have no meaning of their own above 192."""
API_SERVER = "_bento_api_server"
WORKER = str(Path(__file__).resolve().with_name("worker.py"))
FOR_EVER = {"max_requests": 2**31 - 1, "max_age": float(2**31 - 1)}
"""Settings of connections to a service."""


def patch_supervisor(socket_path, control):
    """Change what circus opens and how it watches."""
    from circus import arbiter, sockets, watcher

    open_socket = sockets.CircusSocket.__init__
    open_arbiter = arbiter.Arbiter.__init__
    open_watcher = watcher.Watcher.__init__
    reap = watcher.Watcher.reap_process

    def socket_init(self, name="", *args, **kwargs):
        if name == API_SERVER:
            kept = {key: kwargs[key] for key in ("backlog",) if key in kwargs}
            open_socket(self, name=name, path=socket_path, replace=True, umask=0o077, **kept)
        else:
            open_socket(self, name, *args, **kwargs)

    def arbiter_init(self, watchers, *args, **kwargs):
        kwargs["endpoint"] = "ipc://" + os.path.join(control, "e")
        kwargs["pubsub_endpoint"] = "ipc://" + os.path.join(control, "p")
        kwargs["check_delay"] = CHECK_DELAY_S
        open_arbiter(self, watchers, **kwargs)

    def watcher_init(self, *args, **kwargs):
        kwargs["respawn"] = int(kwargs.get("numprocesses") or 1) > 1
        kwargs["graceful_timeout"] = 86400
        arguments = kwargs.get("args")
        if isinstance(arguments, list) and arguments[0] == "-m":
            kwargs["args"] = [WORKER, *arguments[1:]]
        open_watcher(self, *args, **kwargs)

    def reap_process(self, pid, *args, **kwargs):
        process = self.processes.get(pid)
        if process is not None and process.age() < YOUNG_S:
            self.respawn = False
        return reap(self, pid, *args, **kwargs)

    sockets.CircusSocket.__init__ = socket_init
    arbiter.Arbiter.__init__ = arbiter_init
    watcher.Watcher.__init__ = watcher_init
    watcher.Watcher.reap_process = reap_process


def patch_environments(service_name):
    """Give a dependency its own default variables, and do not ask it for those of the entry service."""
    from _bentoml_impl import loader

    load = loader.load

    def loaded(*args, **kwargs):
        service = load(*args, **kwargs)
        if service_name and getattr(service, "name", service_name) != service_name:
            service.envs[:] = []
            for variable in service.find_dependent_by_name(service_name).envs:
                if getattr(variable, "stage", "all") == "build" or variable.name in os.environ:
                    continue
                if variable.value:
                    os.environ[variable.name] = str(variable.value)
                else:
                    sys.exit(
                        "Environment variable %r is required by %s and has no value." % (variable.name, service_name)
                    )
        return service

    loader.load = loaded


def keep_connections(arguments):
    """Have calls to other services keep their connections, by BentoML's configuration.

    BentoML 1.4.31 and later end all connections to a service at each hundredth call and every five minutes, and with
    them the calls that are on them: issue 5540 of BentoML. The gateway, to which they lead, shares calls out itself.
    """
    marked = (place for place, word in enumerate(arguments) if word == "--depends")
    services = [arguments[place + 1].partition("=")[0] for place in marked]
    spec = importlib.util.find_spec("_bentoml_sdk")
    if not services or spec is None or not spec.origin:
        return
    try:  # Read, not imported, which would take in the configuration. One without the setting does not start with it.
        known = "runner_connection:" in Path(spec.origin).with_name("service").joinpath("config.py").read_text()
    except OSError:
        return
    if known:
        overrides = json.loads(os.environ.get("BENTOML_CONFIG_OVERRIDES") or "{}")
        for service in services:
            config = overrides.setdefault("services", {}).setdefault(service, {})
            config["runner_connection"] = dict(FOR_EVER, **config.get("runner_connection", {}))
        os.environ["BENTOML_CONFIG_OVERRIDES"] = json.dumps(overrides)


def end_with_the_reader():
    """End the container once nobody reads its output; the kernel ends the other processes with the first."""
    poll = select.poll()
    poll.register(1, 0)

    def wait():
        poll.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(argv):
    """Run until the server ends."""
    if os.getpid() == 1:
        end_with_the_reader()
    socket_path, control, kind = argv[1:4]
    arguments = argv[4:]
    # The folder of this file is no place to import from: its modules have names that a bento may use too.
    sys.path[0] = ""
    patch_supervisor(socket_path, control)
    if kind == "serve":
        from bentoml_cli.cli import cli

        sys.argv = ["bentoml", "serve", *arguments]
        cli()
        return
    keep_connections(arguments)
    name = arguments[arguments.index("--service-name") + 1] if "--service-name" in arguments else ""
    try:
        patch_environments(name)
    except ImportError:
        pass  # BentoML before 1.2
    try:
        from bentoml_cli._internal.start import build_start_command
    except ImportError:
        from bentoml_cli.start import build_start_command  # BentoML before 1.4

    sys.argv = ["start", "start-http-server", *arguments]
    build_start_command()()


def memory_ran_out():
    """Whether the kernel ended a process of this container."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            with open(path) as file:
                counts = dict(line.split() for line in file)
        except (OSError, ValueError):
            continue
        if counts.get("oom_kill", "0") != "0":
            return True
    return False


def run(argv):
    """Run `main`; gives the status."""
    try:
        main(argv)
    except RuntimeError as exc:
        if "No active process found" not in str(exc):
            raise
        # Said by the supervisor with a page of its own traceback, below which the worker's last words would be lost.
        sys.stderr.write("The server ended: its worker processes are gone.\n")
        return 1
    except SystemExit as exc:
        if isinstance(exc.code, str):
            sys.stderr.write(exc.code + "\n")
            return 1
        return exc.code or 0
    return 0


if __name__ == "__main__":
    status = run(sys.argv)
    sys.exit(OUT_OF_MEMORY if status and os.getpid() == 1 and memory_ran_out() else status)
