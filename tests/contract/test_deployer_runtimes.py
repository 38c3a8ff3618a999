"""What every local runtime promises: replicas as processes and as containers."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes import Phase, ReplicaStatus, SecretFile, SetSpec, SetStatus
from services.deployer.runtimes.containers import ContainerStarter
from services.deployer.runtimes.podman import Podman
from services.deployer.runtimes.process import ProcessRuntime, open_process_runtime
from services.deployer.runtimes.replica import Limits
from services.deployer.runtimes.serving import Telemetry
from services.deployer.runtimes.sessions import ExecSpec
from services.deployer.runtimes.starting import ProcessStarter, Starter
from services.kernel import processes, shim
from tests.bentoml_clients import client
from tests.fixtures_containers import Made, built, images, need_podman, wipe
from tests.fixtures_deployer import Built

__all__ = ["built", "images"]

pytestmark = pytest.mark.timeout(400)

MEMORY_SOURCE = """
import os, bentoml

@bentoml.service
class Hungry:
    @bentoml.api
    def eat(self, mebibytes: int) -> int:
        return len(os.urandom(1 << 20) * mebibytes)
"""


@dataclass
class Bench:
    """Folders of one runtime, and how it is opened."""

    kind: str
    data: Path
    run: Path
    images: Callable[..., Made]
    fetched: dict[str, Path]
    podman: Podman | None = None

    @asynccontextmanager
    async def open(self, **limits: Any) -> AsyncIterator[ProcessRuntime]:
        """A runtime; at the end its replicas are left to the next."""
        fast = Limits(orphan_grace_s=20.0, **limits)
        async with open_process_runtime(self.data, self.run, await self.starter(), limits=fast) as runtime:
            yield runtime

    async def starter(self) -> Starter:
        """What the runtime starts replicas with."""
        if self.kind == "process":

            async def fetch(resource: str, into: Path) -> None:
                await asyncio.to_thread(shutil.copytree, self.fetched[resource], into, symlinks=True)

            return ProcessStarter(self.data, self.run, fetch, Telemetry())
        assert self.podman is not None
        return ContainerStarter(self.podman, self.run, Telemetry(), "host")

    def spec(self, bento: Built, service: str, **changes: Any) -> SetSpec:
        """What a deployer would ask for."""
        name = f"bentoRepositories/{bento.tag[0]}/bentos/{bento.tag[1]}"
        self.fetched[name] = bento.folder
        models = []
        for folder in bento.models:
            model = f"modelRepositories/{folder.parent.name}/models/{folder.name}"
            self.fetched[model] = folder
            models.append((model, f"sha256:{folder.name}"))
        generation = "1.1" if bento.tag[0] == "old" else "1.4"
        made = self.images(bento) if self.kind == "podman" else Made("", "")
        return SetSpec(
            **{
                "key": f"{service.lower()}{bento.tag[1]}"[:20],
                "deployment": "deployments/tried",
                "deployment_uid": "uid-of-tried",
                "revision": 1,
                "target": "main",
                "service": service,
                "entry": True,
                "legacy": generation == "1.1",
                "bento": name,
                "bento_digest": f"sha256:{bento.tag[1]}",
                "models": tuple(models),
                "environment": str(client(generation).parent) if self.kind == "process" else "",
                "image": made.location,
                "image_digest": made.digest,
                "drain_s": 10.0,
                **changes,
            }
        )

    def pids(self) -> list[int]:
        """Every process of a replica."""
        mark = processes.mark_of("deployer", self.data)
        return [pid for pid, of, _ in processes._marked(processes.MARK) if of == mark and not shim.is_zombie(pid)]

    def shims(self) -> list[int]:
        """The shims."""
        mark = processes.mark_of("deployer", self.data)
        return [pid for pid, of, _ in processes._marked(processes.SHIM_MARK) if of == mark and not shim.is_zombie(pid)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman for all tests here: each image is pulled once."""
    need_podman()
    data, run = tmp_path_factory.mktemp("podman"), Path(tempfile.mkdtemp(prefix="ekr-", dir="/tmp"))
    podman = Podman(data, run)
    yield podman
    wipe(podman)
    shutil.rmtree(run, ignore_errors=True)


@pytest.fixture(params=["process", "podman"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """A runtime's folders, in which nothing lives on."""
    podman, images = None, None
    if request.param == "podman":
        podman, images = request.getfixturevalue("store"), request.getfixturevalue("images")
    before = os.umask(0o077)  # as the suite has it
    bench = Bench(
        request.param, tmp_path / "data", Path(tempfile.mkdtemp(prefix="ekr-", dir="/tmp")), images, {}, podman
    )
    yield bench
    for process in await processes.adopt(bench.run / "p"):
        await process.kill()
    await processes.end_strays(processes.mark_of("deployer", bench.data))
    if podman is not None:
        await podman.run("rm", "--all", "--force", "--time", "0")
    shutil.rmtree(bench.run, ignore_errors=True)
    os.umask(before)


async def see(
    runtime: ProcessRuntime, key: str, wanted: Callable[[SetStatus], bool], timeout_s: float = 90
) -> SetStatus:
    """The set once it is as wanted."""
    last: SetStatus | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                last = next((one for one in await runtime.observe() if one.key == key), None)
                if last is not None and wanted(last):
                    return last
                await runtime.changed()
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s; last: {last}") from None


def ready(count: int) -> Callable[[SetStatus], bool]:
    """So many replicas answer, and there are no others."""
    return lambda one: one.count(Phase.READY) == count == len(one.replicas)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Poll."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


async def call(replica: ReplicaStatus, path: str, body: Any) -> tuple[int, str]:
    """A request, as a gateway makes it."""
    connector = aiohttp.UnixConnector(replica.address.removeprefix("unix:"), force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        kind = {"data": body} if isinstance(body, str) else {"json": body}
        async with session.post(f"http://replica{path}", **kind) as response:
            return response.status, await response.text()


async def printed(runtime: ProcessRuntime, spec: SetSpec, replica: str = "") -> str:
    """All lines of a set."""
    return "\n".join([line.text async for line in runtime.logs(spec.deployment_uid, replica=replica, tail=-1)])


async def leave(runtime: ProcessRuntime, spec: SetSpec) -> None:
    """Scale to nothing, as a deployer does: once nobody routes to a replica it may end."""
    await runtime.scale(spec.key, 0)
    async with asyncio.timeout(60):
        while found := [one for one in await runtime.observe() if one.key == spec.key]:
            await runtime.release([replica.replica for one in found for replica in one.replicas])
            await runtime.changed()


async def stop(runtime: ProcessRuntime) -> None:
    """End all, as at Ctrl-C."""
    await runtime.release([replica.replica for one in await runtime.observe() for replica in one.replicas])
    await runtime.drain(2.0)


async def test_a_replica_has_its_environment_files_and_folders_and_prints_into_its_log(
    bench: Bench, built: Callable[..., Built]
) -> None:
    envs = {"API_KEY": "hush hush\nhush", "HOME": "/nowhere", "GREETING": "a,b=c \"d'"}
    files = (SecretFile("$BENTO_PATH/keys/a.pem", "PEM"), SecretFile("~/.token", "T"))
    spec = bench.spec(built("plain"), "Plain", envs=envs, files=files)
    async with bench.open() as runtime:
        await runtime.apply(spec, 1)
        (replica,) = (await see(runtime, spec.key, ready(1))).replicas
        status, text = await call(replica, "/env", {})
        assert status == 200
        env = json.loads(text)
        assert (env["API_KEY"], env["GREETING"]) == ("hush hush\nhush", envs["GREETING"])
        assert "EKIBEN_SERVER_SERVICE_TOKEN_FILE" not in env
        assert "Service Plain initialized" in await printed(runtime, spec)
        kept = [path for path in bench.data.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
        kept += [path for path in bench.run.rglob("*") if path.is_file()]
        assert not [path for path in kept if b"hush hush" in path.read_bytes()], "a secret was written down"
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in bench.pids()]
        assert commands and not any(b"hush hush" in command for command in commands)
        await leave(runtime, spec)
        assert not bench.pids()
        assert "Service instance cleanup finalized" in await printed(runtime, spec, replica.replica)
        assert not list((bench.data / "replicas").iterdir())


async def test_models_and_both_generations_are_served(bench: Bench, built: Callable[..., Built]) -> None:
    modelled, old = bench.spec(built("modelled"), "Modelled"), bench.spec(built("old"), "svc")
    async with bench.open() as runtime:
        for spec in (modelled, old):
            await runtime.apply(spec, 1)
        (one,) = (await see(runtime, modelled.key, ready(1))).replicas
        assert await call(one, "/read", {}) == (200, "forty-two")
        (other,) = (await see(runtime, old.key, ready(1))).replicas
        assert await call(other, "/shout", "hey") == (200, "HEY")
        await stop(runtime)


async def test_a_drained_replica_answers_what_it_has_and_goes(bench: Bench, built: Callable[..., Built]) -> None:
    spec = bench.spec(built("plain"), "Plain")
    async with bench.open() as runtime:
        await runtime.apply(spec, 2)
        (first, second) = (await see(runtime, spec.key, ready(2))).replicas
        assert first.address != second.address
        running = asyncio.create_task(call(first, "/slow", {"seconds": 2}))
        other = asyncio.create_task(call(second, "/slow", {"seconds": 2}))
        await until(lambda: not running.done(), "a request")
        await runtime.scale(spec.key, 1)
        seen = await see(runtime, spec.key, lambda one: one.count(Phase.DRAINING) == 1)
        await runtime.release([replica.replica for replica in seen.replicas if replica.phase is Phase.DRAINING])
        await see(runtime, spec.key, ready(1))
        assert await running == await other == (200, "done")
        await stop(runtime)
    assert not bench.pids()


async def test_a_replica_that_uses_too_much_memory_is_ended_and_started_again(
    bench: Bench, built: Callable[..., Built]
) -> None:
    spec = bench.spec(built("hungry", MEMORY_SOURCE), "Hungry", memory_bytes=400 << 20, cpu_millicores=1500)
    async with bench.open() as runtime:
        await runtime.apply(spec, 1)
        (replica,) = (await see(runtime, spec.key, ready(1))).replicas
        with pytest.raises(aiohttp.ClientError):
            await call(replica, "/eat", {"mebibytes": 1500})
        seen = await see(runtime, spec.key, lambda one: one.count(Phase.CRASHED) == 1)
        assert "more memory than its instance type has" in seen.replicas[0].message
        (again,) = (await see(runtime, spec.key, ready(1))).replicas
        assert again.restart_count == 1
        await stop(runtime)


async def test_one_that_cannot_start_says_why_and_is_tried_again(bench: Bench, built: Callable[..., Built]) -> None:
    spec = bench.spec(built("needy"), "Needy", envs={"LICENSE": "1"})
    async with bench.open() as runtime:
        await runtime.apply(spec, 1)
        seen = await see(runtime, spec.key, lambda one: one.replicas[0].failed_starts > 0)
        assert "the license server said no" in seen.replicas[0].last_lines
        await see(runtime, spec.key, lambda one: one.replicas[0].restart_count > 0)
        await runtime.scale(spec.key, 0)
        await stop(runtime)
    assert not bench.pids()


@pytest.mark.parametrize("victims", ["workers", "shim"])
async def test_what_is_killed_is_ended_whole_and_started_again(
    bench: Bench, built: Callable[..., Built], victims: str
) -> None:
    spec = bench.spec(built("plain"), "Plain")
    async with bench.open() as runtime:
        await runtime.apply(spec, 1)
        await see(runtime, spec.key, ready(1))
        before = bench.pids()
        chosen = {"shim": bench.shims(), "workers": before}[victims]
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)
        await see(runtime, spec.key, lambda one: one.replicas[0].phase is Phase.CRASHED)
        (again,) = (await see(runtime, spec.key, ready(1))).replicas
        assert again.restart_count == 1
        assert not set(before) & set(bench.pids())
        assert len(bench.shims()) == 1
        await stop(runtime)


async def test_the_next_runtime_adopts_what_runs_and_ends_what_it_cannot(
    bench: Bench, built: Callable[..., Built]
) -> None:
    spec = bench.spec(built("plain"), "Plain")
    async with bench.open() as runtime:
        await runtime.apply(spec, 2)
        await see(runtime, spec.key, ready(2))
        before = bench.pids()
    # One of them loses its shim while nobody looks.
    os.kill(bench.shims()[0], signal.SIGKILL)
    async with bench.open() as runtime:
        (adopted,) = await runtime.observe()
        assert [replica.phase for replica in adopted.replicas] == [Phase.READY]
        left = set(bench.pids())
        assert left and left < set(before)
        await runtime.apply(spec, 1)
        assert await call(adopted.replicas[0], "/slow", {"seconds": 0}) == (200, "done")
        await stop(runtime)
    assert not bench.pids()


async def test_nobody_adopts_and_all_ends_by_itself(bench: Bench, built: Callable[..., Built]) -> None:
    spec = bench.spec(built("plain"), "Plain", drain_s=1.0)
    async with open_process_runtime(
        bench.data, bench.run, await bench.starter(), limits=Limits(orphan_grace_s=0.5)
    ) as runtime:
        await runtime.apply(spec, 1)
        await see(runtime, spec.key, ready(1))
    await until(lambda: not bench.pids() and not bench.shims(), "no process")


async def test_what_the_builder_made_and_is_gone_has_a_reason(bench: Bench, built: Callable[..., Built]) -> None:
    spec = bench.spec(built("plain"), "Plain")
    missing = replace(spec, environment="/nowhere", image="oci:/nowhere:x", image_digest=f"sha256:{'0' * 64}")
    async with bench.open() as runtime:
        await runtime.apply(missing, 1)
        seen = await see(runtime, spec.key, lambda one: bool(one.replicas and one.replicas[0].reason))
        assert seen.replicas[0].reason == ("ENVIRONMENT_MISSING" if bench.kind == "process" else "IMAGE_MISSING")
        await runtime.apply(spec, 1)
        await see(runtime, spec.key, ready(1))
        await stop(runtime)


async def test_a_command_runs_where_the_replica_is(bench: Bench, built: Callable[..., Built]) -> None:
    spec = bench.spec(built("plain"), "Plain", envs={"TOKEN": "of the replica"})
    async with bench.open() as runtime:
        await runtime.apply(spec, 1)
        (replica,) = (await see(runtime, spec.key, ready(1))).replicas

        async def outcome(command: tuple[str, ...], *, tty: bool = False) -> tuple[int | None, str]:
            asked = ExecSpec(spec.deployment_uid, replica.replica, command, tty=tty, columns=90, rows=20)
            async with runtime.exec(asked) as session:
                if not tty:
                    await session.send(b"typed\n")
                    await session.end_input()
                text = "".join([data.decode() async for _, data in session.output()])
                return session.exit_code, text

        code, text = await outcome(("sh", "-c", "echo $TOKEN; cat; test -d $BENTOML_HOME && exit 3"))
        assert (code, text) == (3, "of the replica\ntyped\n")
        code, text = await outcome(
            ("sh", "-c", 'until [ "$(stty size)" = "20 90" ]; do sleep 0.05; done; stty size'), tty=True
        )
        assert (code, text.strip()) == (0, "20 90")
        with pytest.raises(FailedPrecondition) as gone:
            async with runtime.exec(ExecSpec(spec.deployment_uid, "nobody", ("true",))):
                pass
        assert gone.value.reason == "REPLICA_NOT_RUNNING"
        await leave(runtime, spec)
