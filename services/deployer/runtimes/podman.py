"""Podman with stores of its own below the deployer's folders: it sees no other containers, and no other sees these.

data_dir/containers/storage      images, and what containers wrote on top of them
data_dir/containers/images       the images that were pulled: digest of the manifest → podman's id, and when last used
run_dir/c                        what podman keeps until the machine starts again
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes.views import show
from services.kernel import processes
from services.kernel.settings import SettingsError

log = logging.getLogger(__name__)

OLDEST = (4, 0)
"""The first with `--log-driver passthrough`: what a container prints goes straight to the shim."""
MOST_PROCESSES = 32768
"""Podman lowers its own limit to this before it sets the container's, which may then not be higher."""
MOST_FILES = 1 << 20
LONGEST_RUNROOT = 50
"""Podman refuses longer paths."""
_CONFIG = """\
# Written by Ekiben: this engine runs replicas and nothing else.
[containers]
default_ulimits = []
[engine]
events_logger = "none"
lock_type = "file"
"""


_REGISTRY_VARIABLES = ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG")
_LOOK = """
import importlib, json
found = []
for kind, name in (("traces", "opentelemetry.exporter.otlp.proto.http.trace_exporter"),
                   ("monitors", "bentoml._internal.monitoring.otlp")):
    try:
        importlib.import_module(name)
    except BaseException:
        pass
    else:
        found.append(kind)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Pulled:
    """An image that is here."""

    id: str
    """Podman's."""
    exports: Sequence[str]
    """What its replicas can send over OTLP/HTTP, of `traces` and `monitors`."""


class Podman:
    """See the module."""

    def __init__(self, data_dir: Path, run_dir: Path, *, runtime: str = "", program: str = "podman") -> None:
        self._mark = processes.mark_of("deployer", data_dir)
        self._data = data_dir / "containers"
        self.volatile = _short(run_dir / "c", self._mark)
        """What is gone when the machine starts again."""
        self._program, self._runtime = program, runtime
        self._images = self._data / "images"
        self._pulling: dict[str, asyncio.Lock] = {}
        self._seen: set[str] = set()
        self.rootless = os.getuid() != 0
        self.limits = True
        """Whether memory and cores of a container can be limited."""

    # Its life

    async def open(self) -> None:
        """Make the stores, and see whether podman works.

        Raises:
            SettingsError: it is not there, too old, or does not work on this machine.
        """
        if shutil.which(self._program) is None:
            raise SettingsError(
                [
                    "runtime is podman, and there is no podman on PATH. Install it (Debian: apt-get install podman), "
                    "or run replicas as processes with runtime=process."
                ]
            )
        await asyncio.to_thread(self._prepare)
        status, output, error = await self.run("info", "--format", "json")
        if status and "database configuration mismatch" in error:
            # The folders were moved or restored somewhere else. Nothing of value is in there: images are pulled again.
            await asyncio.to_thread(self._forget_all)
            status, output, error = await self.run("info", "--format", "json")
        if status:
            raise SettingsError(
                [
                    f"runtime is podman, which does not work here: {said(error).rstrip('.')}. Mend that until "
                    "`podman info` works for this user, or run replicas as processes with runtime=process."
                ]
            )
        about: dict[str, Any] = json.loads(output)
        version = str(about["version"]["Version"])
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
            raise SettingsError([f"runtime is podman, of which 4.0 or later is needed; {version} is installed."])
        host = about["host"]
        self.limits = not self.rootless or (
            host.get("cgroupVersion") == "v2" and host.get("cgroupManager") == "systemd"
        )
        log.info("podman runs replicas", extra={"version": version, "runtime": host["ociRuntime"]["name"]})

    def _prepare(self) -> None:
        for folder in (self._data, self._images, self.volatile):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.volatile.is_symlink() or self.volatile.stat().st_uid != os.getuid():
            raise SettingsError(
                [f"The folder {self.volatile} belongs to somebody else; remove it, or shorten run_dir."]
            )
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        booted = self.volatile / "boot"
        if not booted.exists() or booted.read_text() != boot:
            # Mounts that podman counted in there are gone.
            for path in self.volatile.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            booted.write_text(boot)
        (self._data / "containers.conf").write_text(_CONFIG)

    def _forget_all(self) -> None:
        for folder in (self._data / "storage", self.volatile / "run", self.volatile / "tmp", self._images):
            shutil.rmtree(folder, ignore_errors=True)
        self._images.mkdir(mode=0o700)

    # Commands

    @property
    def env(self) -> dict[str, str]:
        """The environment of podman itself, from which a container gets nothing that is not named."""
        kept = ("PATH", "HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "TMPDIR")
        own = {name: os.environ[name] for name in kept if name in os.environ}
        return {"PATH": "/usr/local/bin:/usr/bin:/bin", **own, "CONTAINERS_CONF": str(self._data / "containers.conf")}

    def command(self, *words: str) -> list[str]:
        """A command line."""
        stores = ["--root", str(self._data / "storage"), "--runroot", str(self.volatile / "run")]
        stores += ["--tmpdir", str(self.volatile / "tmp")]
        # Else podman leaves a mount behind with which the data directory can neither be moved nor removed.
        stores += ["--storage-opt", "overlay.skip_mount_home=true"]
        runtime = self._runtime or ("runc" if hybrid() and shutil.which("runc") else "")
        return [self._program, *stores, *(["--runtime", runtime] if runtime else []), *words]

    async def run(
        self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Run one: its status and what it printed. Cancelled, it is killed; `end_strays` knows what we leave behind."""
        process = await asyncio.create_subprocess_exec(
            *self.command(*words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env={**self.env, **(env or {}), processes.MARK: f"{self._mark}/podman"},
        )
        try:
            output, error = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        return process.returncode or 0, output.decode(errors="replace"), error.decode(errors="replace")

    # Images

    async def image(self, location: str, digest: str, tell: Callable[[str], None]) -> Pulled:
        """An image, which is pulled unless it is here.

        Args:
            location: `oci:FOLDER[:REFERENCE]` or `docker://HOST/NAME`.
            digest: of the manifest or the index: whatever the reference names by now, this is what is pulled.

        Raises:
            FailedPrecondition: it is not there any more (IMAGE_MISSING), or cannot be pulled (IMAGE_NOT_PULLED).
        """
        name = digest.removeprefix("sha256:")
        kept = self._images / name
        async with self._pulling.setdefault(name, asyncio.Lock()):
            known = await asyncio.to_thread(_read, kept)
            if known and (known.id in self._seen or (await self.run("image", "exists", known.id))[0] == 0):
                await asyncio.to_thread(os.utime, kept)
                self._seen.add(known.id)
                return known
            tell("Its image is being pulled.")
            began = time.monotonic()
            id = await self._pull(location, digest)
            found = Pulled(id, await self._exports(id))
            await asyncio.to_thread(_write, kept, found)
            self._seen.add(id)
            log.info("image pulled", extra={"image": digest, "seconds": round(time.monotonic() - began, 1)})
            return found

    async def _exports(self, id: str) -> Sequence[str]:
        """Tried in a container, once: BentoML fails at its start when it is told to send what it cannot."""
        alone = ["--network=none", "--read-only", "--cap-drop=all", "--log-driver=none", "--entrypoint=python"]
        status, output, error = await self.run("run", "--rm", "--pull=never", *alone, *ulimits(), id, "-I", "-c", _LOOK)
        with contextlib.suppress(ValueError, IndexError):
            return tuple(json.loads(output.strip().splitlines()[-1]))
        log.warning("replicas of an image send no telemetry", extra={"status": status, "error": said(error)})
        return ()

    def doubt(self) -> None:
        """Something failed: look again whether images are there."""
        self._seen.clear()

    async def _pull(self, location: str, digest: str) -> str:
        if location.startswith("docker://"):
            named = re.sub(r"(:[^/:@]+)?(@[^@]+)?$", "", location)
            options, env = _of_registry(location)
            return self._pulled(location, *await self.run("pull", "-q", *options, f"{named}@{digest}", env=env))
        folder = Path(location.removeprefix("oci:").partition(":")[0])
        # A layout with this one image: names in the builder's own may be moved, and its index rewritten, at any time.
        view = self._data / "views" / secrets.token_hex(8)
        try:
            await asyncio.to_thread(show, folder, digest, view)
            # Podman makes a name of the folder's path, which not every path can be.
            return self._pulled(location, *await self.run("pull", "-q", f"oci:{view.name}:image", cwd=view.parent))
        finally:
            await asyncio.to_thread(shutil.rmtree, view, ignore_errors=True)

    def _pulled(self, location: str, status: int, output: str, error: str) -> str:
        if status and re.search(r"manifest unknown|no such file|not found", error):
            raise FailedPrecondition(f"The image {location} is not there: {said(error)}", reason="IMAGE_MISSING")
        if status:
            raise FailedPrecondition(
                f"The image {location} cannot be pulled: {said(error)} It is tried again.", reason="IMAGE_NOT_PULLED"
            )
        return output.strip().splitlines()[-1]

    async def prune(self, digests: Collection[str], older_than_s: float) -> None:
        """Remove images that are not among the digests and were not used for so long."""
        used = {digest.removeprefix("sha256:") for digest in digests}
        old = await asyncio.to_thread(self._unused, used, time.time() - older_than_s)
        for kept, id in old:
            async with self._pulling.setdefault(kept.name, asyncio.Lock()):
                await self.run("untag", id)
                # One that a container still has is not removed; by the time that has ended it is tried again.
                if (await self.run("rmi", id))[0] == 0 or (await self.run("image", "exists", id))[0]:
                    self._seen.discard(id)
                    kept.unlink(missing_ok=True)

    def _unused(self, used: Collection[str], long_ago: float) -> list[tuple[Path, str]]:
        found = {path: _read(path) for path in self._images.iterdir()}
        needed = {one.id for path, one in found.items() if one and path.name in used}
        return [
            (path, one.id)
            for path, one in found.items()
            if one and one.id not in needed and path.name not in used and path.stat().st_mtime < long_ago
        ]

    # Containers

    async def containers(self) -> list[str]:
        """The names of all containers."""
        status, output, error = await self.run("ps", "--all", "--format", "{{.Names}}")
        if status:
            log.warning("containers cannot be listed", extra={"error": said(error)})
        return output.split()

    async def remove(self, *names: str) -> None:
        """End and remove containers; those that are not there are passed over."""
        status, _, error = await self.run("rm", "--force", "--ignore", "--time", "0", "--volumes", *names)
        if status:
            log.warning("containers could not be removed", extra={"containers": names, "error": said(error)})


def said(error: str) -> str:
    """What podman said last, without what it says before each line."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ").strip() if lines else "it said nothing."


def hybrid() -> bool:
    """Whether control groups of both versions are mounted, with which crun refuses to work and runc does."""
    groups = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        return not (groups / "cgroup.controllers").exists() and bool(
            (groups / "unified" / "cgroup.controllers").read_text().strip()
        )
    return False


def ulimits() -> Sequence[str]:
    """Options for limits that this process may set: podman's own are too high where it may not raise them."""
    files, tasks = resource.getrlimit(resource.RLIMIT_NOFILE)[1], resource.getrlimit(resource.RLIMIT_NPROC)[1]
    files = MOST_FILES if files == resource.RLIM_INFINITY else min(files, MOST_FILES)
    tasks = MOST_PROCESSES if tasks == resource.RLIM_INFINITY else min(tasks, MOST_PROCESSES)
    return ["--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={tasks}:{tasks}"]


def _of_registry(location: str) -> tuple[list[str], dict[str, str]]:
    """Options and variables for a pull, as the builder has them: what it may push to must be there to be pulled."""
    host = location.removeprefix("docker://").partition("/")[0]
    told = (*_REGISTRY_VARIABLES, *(name for name in os.environ if name.lower().endswith("_proxy")))
    insecure = [each.strip() for each in os.environ.get("EKIBEN_REGISTRY_INSECURE", "").split(",")]
    certificates = Path(os.environ.get("EKIBEN_REGISTRY_CERTIFICATES") or "/nowhere", host)
    options = [
        *(["--tls-verify=false"] if host in insecure else []),
        *([f"--cert-dir={certificates}"] if certificates.is_dir() else []),
    ]
    return options, {name: os.environ[name] for name in told if name in os.environ}


def _short(folder: Path, mark: str) -> Path:
    """The folder, or another whose path podman takes: one that is gone with the machine, if there is any."""
    if len(str(folder / "run")) <= LONGEST_RUNROOT:
        return folder
    usual = Path(os.environ.get("XDG_RUNTIME_DIR") or "/run")
    return (usual if os.access(usual, os.W_OK) else Path("/tmp")) / f"ekc-{mark[-12:]}"


def _read(file: Path) -> Pulled | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        told = json.loads(file.read_text())
        return Pulled(str(told["id"]), tuple(told["exports"]))
    return None


def _write(file: Path, image: Pulled) -> None:
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(json.dumps({"id": image.id, "exports": image.exports}))
    fresh.replace(file)
