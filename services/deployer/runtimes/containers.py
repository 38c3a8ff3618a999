"""Replicas as containers of their bento's image, each below a shim as processes are.

The shim runs `podman run` in the foreground. Podman passes on the signal that ends a replica; its monitor and the
container are below the shim too, and what the container prints goes into the shim's log without podman in between.
Whatever happens to podman, the shim ends the tree; when the shim is killed the container's first process notices that
nobody reads what it prints, and ends with all the others.

In a container, beside the image, which is read-only:

    /run/ekiben/s                    the replica's own sockets; its listener is `s`
    /run/ekiben/d/{key}              where a gateway listens for calls to a service that this one calls
    /run/ekiben/programs             our launcher
    /run/ekiben/replica, /tmp        BENTOML_HOME, monitoring, temporary files: gone with the replica
    /run/ekiben/home                 HOME, shared by the replicas of a deployment
"""

import asyncio
import contextlib
import csv
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from ekiben.errors import InvalidArgument
from services.deployer.runtimes import SecretFile, SetSpec, launcher, serving
from services.deployer.runtimes.podman import Podman, Pulled, ulimits
from services.deployer.runtimes.starting import CONTENT_KEPT_S, OUT_OF_MEMORY, Folders, Launch, not_running
from services.kernel import processes

BENTO = Path(serving.BENTO)
INSIDE = Path("/run/ekiben")
LEAST_SHARED_BYTES = 1 << 30
"""Size of /dev/shm at least, through which data loaders pass tensors. Only what is used of it takes memory."""
_ENTER = """
import os, sys
for pair in open("/proc/1/environ", "rb").read().split(b"\\0"):
    name, equals, value = pair.partition(b"=")
    if equals and name not in (b"TERM", b"container"):
        os.environb[name] = value
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as exc:
    print(f"{sys.argv[1]}: {exc.strerror}", file=sys.stderr)
    sys.exit(127)
"""
"""Runs a command with what the replica's own process was given, which podman does not know."""
NOT_STARTED = 125
"""Podman's own status for a container that it could not start."""


class ContainerStarter:
    """See the module."""

    name = "podman"

    def __init__(self, podman: Podman, run_dir: Path, telemetry: serving.Telemetry, network: str) -> None:
        self._podman, self._run, self._telemetry, self._network = podman, run_dir, telemetry, network
        self._owner = os.getuid() if podman.rootless else serving.USER

    def replica_socket(self, replica: str) -> Path:
        """See Starter."""
        return self._run / "t" / replica / "s"

    def set_socket(self, key: str) -> Path:
        """See Starter."""
        return self._run / "d" / key / "s"

    def prepare_set(self, key: str) -> None:
        """See Starter. A folder of its own, so that a container sees the services that it calls and no others."""
        folder = self.set_socket(key).parent
        if not folder.is_dir():
            folder.unlink(missing_ok=True)  # Left by a deployer that ran processes.
            folder.mkdir(parents=True)
        folder.chmod(0o755)  # Nobody but us and the containers gets as far as here.

    async def start(self, replica: str, spec: SetSpec, folders: Folders, tell: Callable[[str], None]) -> Launch:
        """See Starter."""
        image = await self._podman.image(spec.image, spec.image_digest, tell)
        return await asyncio.to_thread(self._prepare, replica, spec, folders, image)

    async def enter(self, replica: str, pid: int, command: Sequence[str], *, tty: bool) -> Launch:
        """See Starter. Hung up, podman leaves what ignores that to the end of the container."""
        _, output, _ = await self._podman.run("inspect", "--format", "{{.State.Running}}", replica)
        if output.strip() != "true":
            raise not_running(replica)
        words = ["exec", "--interactive", *(["--tty"] if tty else []), replica, "python", "-I", "-c", _ENTER, *command]
        return Launch(self._podman.command(*words), self._podman.env, self._run)

    async def ended(self, replica: str, returncode: int | None) -> str:
        """See Starter."""
        _, output, _ = await self._podman.run("inspect", "--format", "{{.State.OOMKilled}}", replica)
        await self._podman.remove(replica)
        if returncode == launcher.OUT_OF_MEMORY or output.strip() == "true":
            return OUT_OF_MEMORY
        if returncode == NOT_STARTED:
            self._podman.doubt()
            return "Its container could not be started."
        if returncode is not None and returncode > 128:
            with contextlib.suppress(ValueError):
                return f"It was killed by {signal.Signals(returncode - 128).name}."
        return ""

    async def clean(self, replica: str) -> None:
        """See Starter."""
        await self._podman.remove(replica)

    async def sweep(self, kept: Collection[str]) -> None:
        """See Starter. Podman is asked for the first time here: what runs must be taken over soon, with it or not."""
        await self._podman.open()
        strays = [name for name in await self._podman.containers() if name not in kept]
        if strays:
            await self._podman.remove(*strays)

    async def prune(self, specs: Collection[SetSpec], keys: Collection[str]) -> None:
        """See Starter."""
        await self._podman.prune([spec.image_digest for spec in specs], CONTENT_KEPT_S)
        for folder in (self._run / "d").iterdir():
            if folder.name not in keys:
                shutil.rmtree(folder, ignore_errors=True)

    # What it is started with

    def _prepare(self, replica: str, spec: SetSpec, folders: Folders, image: Pulled) -> Launch:
        own, socket = folders.own / "container", folders.socket.parent
        for folder in (own / "home", own / "monitoring", own / "tmp", socket, folders.user_home):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._give(folder)
        own.chmod(0o711)
        programs = folders.own / "programs"
        programs.mkdir(exist_ok=True)
        programs.chmod(0o755)
        for program in (serving.LAUNCHER, serving.WORKER, serving.INSIDE):
            shutil.copyfile(program, programs / program.name)
            (programs / program.name).chmod(0o644)
        mounts = [
            _mount(socket, INSIDE / "s"),
            _mount(programs, INSIDE / "programs", read_only=True),
            _mount(own, INSIDE / "replica"),
            _mount(own / "tmp", Path("/tmp")),
            _mount(folders.user_home, INSIDE / "home"),
        ]
        mounts += [_mount(self.set_socket(key).parent, INSIDE / "d" / key) for _, key in spec.dependencies]
        mounts += self._files(spec, folders.own / "files")
        places = serving.Places(
            home=INSIDE / "replica" / "home",
            user_home=INSIDE / "home",
            temporary=Path("/tmp"),
            bento=BENTO,
            socket=INSIDE / "s" / folders.socket.name,
            control=INSIDE / "s",
            monitoring=INSIDE / "replica" / "monitoring",
        )
        if spec.legacy:
            config = json.dumps(serving.legacy_config(spec, self._telemetry, image.exports))
            self._write(own / "home" / "bentoml.yaml", config)
        sockets = {service: INSIDE / "d" / key / "s" for service, key in spec.dependencies}
        program = INSIDE / "programs" / serving.LAUNCHER.name
        _, *argv = serving.command(spec, places, sockets, python="", launcher=program, drain_s=spec.drain_s)
        env = serving.environment(spec, places, self._telemetry, image.exports, replica, {})
        self._write(socket / "start", json.dumps({"argv": argv, "env": env}))
        note = "" if self._podman.limits else "Podman cannot limit memory and cores on this machine."
        limits = [
            *([f"--memory={spec.memory_bytes}", f"--memory-swap={spec.memory_bytes}"] if spec.memory_bytes else []),
            *([f"--cpus={spec.cpu_millicores / 1000}"] if spec.cpu_millicores else []),
        ]
        command = self._podman.command(
            "run",
            "--name",
            replica,
            "--replace",
            "--pull=never",
            "--log-driver=passthrough",
            "--http-proxy=false",
            "--read-only",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            "--security-opt=label=disable",
            f"--network={self._network}",
            f"--user={serving.USER}:{serving.USER}",
            *([f"--userns=keep-id:uid={serving.USER},gid={serving.USER}"] if self._podman.rootless else []),
            *ulimits(),
            *(limits if self._podman.limits else []),
            f"--shm-size={max(LEAST_SHARED_BYTES, spec.memory_bytes)}",
            f"--env={processes.MARK}",
            *mounts,
            f"--workdir={BENTO}",
            "--entrypoint=python",
            image.id,
            "-I",
            str(INSIDE / "programs" / serving.INSIDE.name),
            str(INSIDE / "s" / "start"),
        )
        return Launch(command, self._podman.env, folders.own, note=note if limits else "")

    def _files(self, spec: SetSpec, folder: Path) -> list[str]:
        """Mounts for the secret files, each readable by the replica's user only."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        mounts = []
        for number, file in enumerate(spec.files):
            self._write(folder / str(number), file.value)
            mounts.append(_mount(folder / str(number), _inside(file), read_only=True))
        return mounts

    def _write(self, file: Path, text: str) -> None:
        file.unlink(missing_ok=True)
        file.touch(mode=0o600)
        file.write_text(text)
        os.chown(file, self._owner, -1)

    def _give(self, folder: Path) -> None:
        """Make it the replica's, with all that is in it: a deployer that ran processes may have filled it."""
        if folder.stat().st_uid == self._owner:
            return
        for top, folders, files in os.walk(folder):
            for name in (*folders, *files):
                os.chown(Path(top, name), self._owner, -1, follow_symlinks=False)
        os.chown(folder, self._owner, -1)


def _inside(file: SecretFile) -> Path:
    """Where a secret file is in a container, which has all of a file system to itself."""
    root, path = PurePosixPath("/"), file.path
    if path.startswith("$BENTO_PATH"):
        root, path = PurePosixPath(BENTO), path.removeprefix("$BENTO_PATH")
    elif path.startswith("~"):
        root, path = PurePosixPath(INSIDE / "home"), path.removeprefix("~")
    target = PurePosixPath(os.path.normpath(root / path.lstrip("/")))
    if not target.is_relative_to(root) or target == root:
        raise InvalidArgument(f"The secret file {file.path} leads out of its folder.", reason="SECRET_PATH_INVALID")
    return Path(target)


def _mount(source: Path, target: Path, *, read_only: bool = False) -> str:
    line = io.StringIO()
    fields = ["type=bind", f"source={source}", f"target={target}", *(["ro=true"] if read_only else [])]
    csv.writer(line, lineterminator="").writerow(fields)
    return f"--mount={line.getvalue()}"
