"""Terminals into replicas: what may be run there, what is recorded of it, and who may see that."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.channel import open_channel
from ekiben.deployer.v1 import terminals_pb2 as pb
from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from ekiben.identity.v1 import identity_pb2
from ekiben.identity.v1.identity_pb2_grpc import AccountsStub
from ekiben.terminals import Terminals
from services.kernel.shim import is_zombie
from tests.fixtures_builder import Registry
from tests.fixtures_deployer import (
    Built,
    DeployerProcess,
    Suite,
    built,
    calling,
    deployer_folders,
    registry,
    running_builds,
    running_deployer,
    suite,
)
from tests.fixtures_kernel import until

__all__ = ["built", "deployer_folders", "registry", "suite"]

pytestmark = pytest.mark.timeout(400)
NAME = "deployments/plain"


@asynccontextmanager
async def terminals_of(registry: Registry, token: str = "") -> AsyncIterator[Terminals]:
    async with open_channel(f"unix:{registry.run_dir}/deployer", token=token or registry.admin_token) as channel:
        yield Terminals(channel)


async def token_of(registry: Registry, user: str, role: int) -> str:
    accounts = AccountsStub(registry.channel)
    wanted = identity_pb2.User(name=f"users/{user}", role=role)
    await accounts.CreateUser(identity_pb2.CreateUserRequest(user=wanted))
    token = identity_pb2.ApiToken(display_name=user, user=f"users/{user}")
    made = await accounts.CreateApiToken(identity_pb2.CreateApiTokenRequest(api_token=token))
    return str(made.token)


async def deployed(suite: Suite, built: Callable[..., Built]) -> str:
    """The id of the one replica."""
    await suite.create("plain", await suite.push(built("plain")))
    await suite.running("plain")
    (replica,) = await suite.replicas("plain")
    return replica.replica


def typed(*words: bytes | pb.TerminalInput) -> AsyncIterator[pb.TerminalInput]:
    async def inputs() -> AsyncIterator[pb.TerminalInput]:
        for word in words:
            yield pb.TerminalInput(data=word) if isinstance(word, bytes) else word
        await asyncio.Event().wait()

    return inputs()


async def events_of(terminals: Terminals, name: str) -> list[list[object]]:
    text = "".join([piece async for piece in terminals.recording(name)])
    return [json.loads(line) for line in text.splitlines()][1:]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists() or is_zombie(pid)


async def test_a_command_runs_as_the_replica_does_and_is_recorded(suite: Suite, built: Callable[..., Built]) -> None:
    replica = await deployed(suite, built)
    async with terminals_of(suite.registry) as terminals:
        code, out, err = await terminals.run(
            NAME, ["sh", "-c", "echo $BENTOML_HOME; cat; echo no >&2; exit 3"], input=b"hi"
        )
        assert code == 3 and err == b"no\n"
        home, said = out.decode().splitlines()
        assert home.startswith(str(suite.data_dir)) and said == "hi"
        (kept,) = [each async for each in terminals.list(NAME)]
        assert (kept.replica, kept.exit_code, kept.end_reason) == (replica, 3, pb.Terminal.EXITED)
        events = await events_of(terminals, kept.name)
        assert [event[1:] for event in events if event[1] in "im"] == [["i", "hi"], ["m", "EXITED 3"]]
        assert "hi" in "".join(str(event[2]) for event in events if event[1] == "o")
        many = await terminals.run(NAME, ["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"])
        assert (many[0], len(many[1])) == (0, 3_000_000)
        with pytest.raises(FailedPrecondition) as missing:
            await terminals.run(NAME, ["no-such-program"])
        assert missing.value.reason == "EXEC_FAILED"
        with pytest.raises(NotFound) as nobody:
            await terminals.create(NAME, replica="nobody")
        assert nobody.value.reason == "REPLICA_NOT_FOUND"
        with pytest.raises(FailedPrecondition) as image:
            await terminals.run(NAME, [], debug_image="tools")
        assert image.value.reason == "DEBUG_UNSUPPORTED"
        with pytest.raises(InvalidArgument):
            await terminals.create(NAME, ["x" * 70_000])


async def test_a_tty_edits_echoes_and_knows_its_size_and_one_that_is_left_is_hung_up(
    suite: Suite, built: Callable[..., Built]
) -> None:
    await deployed(suite, built)
    async with terminals_of(suite.registry) as terminals:
        terminal = await terminals.create(NAME, ["sh"], tty=True)
        keys: asyncio.Queue[pb.TerminalInput] = asyncio.Queue()

        async def pressed() -> AsyncIterator[pb.TerminalInput]:
            while True:
                yield await keys.get()

        keys.put_nowait(pb.TerminalInput(data=b"tty; stty size\n"))
        seen, steps = "", [b"stty size; exit 4\n"]
        async for output in terminals.attach(terminal.name, pressed(), size=(100, 30)):
            seen += output.stdout.decode()
            if "30 100" in seen and steps:
                keys.put_nowait(pb.TerminalInput(resize=pb.TerminalSize(columns=132, rows=43)))
                keys.put_nowait(pb.TerminalInput(data=steps.pop()))
            last = output
        assert last.exit.exit_code == 4
        assert "/dev/pts/" in seen and "43 132" in seen
        events = await events_of(terminals, terminal.name)
        assert [event[2] for event in events if event[1] == "r"] == ["132x43"]
        assert not [event for event in events if event[1] == "i"]

        with pytest.raises(FailedPrecondition) as taken:
            await anext(terminals.attach(terminal.name, typed()))
        assert taken.value.reason == "TERMINAL_TAKEN"

        left = await terminals.create(NAME, ["sh", "-c", "echo $$; trap '' HUP; sleep 600"])
        outputs = terminals.attach(left.name, typed())
        pid = 0
        async for output in outputs:
            if output.stdout:
                pid = int(output.stdout)
                break
        await outputs.aclose()  # type: ignore[attr-defined]
        assert pid
        await until(lambda: gone(pid), "what ran in it is gone", 20)

        async def closed() -> bool:
            return (await terminals.get(left.name)).end_reason == pb.Terminal.CLIENT_LEFT

        await until(closed, "it is known that the caller left", 20)


async def test_developers_see_their_own_viewers_none_and_admins_all(suite: Suite, built: Callable[..., Built]) -> None:
    await deployed(suite, built)
    dan = await token_of(suite.registry, "dan", Role.ROLE_DEVELOPER)
    vera = await token_of(suite.registry, "vera", Role.ROLE_VIEWER)
    async with (
        terminals_of(suite.registry) as admin,
        terminals_of(suite.registry, dan) as developer,
        terminals_of(suite.registry, vera) as viewer,
    ):
        for call in (viewer.run(NAME, ["true"]), viewer.get(f"{NAME}/terminals/t1")):
            with pytest.raises(PermissionDenied):
                await call
        assert (await developer.run(NAME, ["true"]))[0] == 0
        assert (await admin.run(NAME, ["false"]))[0] == 1
        (own,) = [each async for each in developer.list(NAME)]
        first, second = [each async for each in admin.list(NAME)]
        assert (second.name, own.creator, first.creator) == (own.name, "users/dan", "users/admin")
        with pytest.raises(NotFound):
            await developer.get(first.name)
        with pytest.raises(PermissionDenied):
            await developer.delete(own.name)  # What was done stays known.
        foreign = await developer.create(NAME, ["true"])
        with pytest.raises(PermissionDenied):
            await anext(admin.attach(foreign.name, typed()))
        await admin.delete(own.name)
        with pytest.raises(NotFound):
            await admin.get(own.name)


async def test_a_terminal_ends_at_its_limits(
    registry: Registry, deployer_folders: tuple[Path, Path], built: Callable[..., Built]
) -> None:
    limits = {"terminal_limit_s": 3.0, "terminal_recording_max_bytes": 65536, "terminals": "admin"}
    async with running_deployer(registry, *deployer_folders, **limits) as suite:
        await deployed(suite, built)
        dan = await token_of(registry, "dan", Role.ROLE_DEVELOPER)
        async with terminals_of(registry) as terminals, terminals_of(registry, dan) as developer:
            with pytest.raises(PermissionDenied) as refused:
                await developer.create(NAME)
            assert "EKIBEN_DEPLOYER_TERMINALS" in str(refused.value)

            async def end_of(command: list[str]) -> pb.TerminalExit:
                terminal = await terminals.create(NAME, command)
                outputs = [output async for output in terminals.attach(terminal.name, typed())]
                kept = await terminals.get(terminal.name)
                assert kept.state == pb.Terminal.ENDED and kept.end_reason == outputs[-1].exit.reason
                assert not kept.HasField("exit_code")
                return outputs[-1].exit

            assert (await end_of(["sleep", "600"])).reason == pb.Terminal.TIME_LIMIT
            assert (await end_of(["sh", "-c", "yes"])).reason == pb.Terminal.RECORDING_FULL


async def test_a_deployer_that_is_killed_leaves_the_recording_and_nothing_that_runs(
    registry: Registry, deployer_folders: tuple[Path, Path], built: Callable[..., Built]
) -> None:
    async with running_builds(registry) as (builds, peer):
        process = DeployerProcess(registry, peer, *deployer_folders)
        try:
            await process.start()
            async with calling(registry, process.address, process.settings, builds) as suite:
                await deployed(suite, built)
                async with terminals_of(registry) as terminals:
                    terminal = await terminals.create(NAME, ["sh", "-c", "echo begun $$; cat"])
                    outputs = terminals.attach(terminal.name, typed())
                    pid = 0
                    async for output in outputs:
                        if output.stdout:
                            pid = int(output.stdout.split()[1])
                            break

                    async def written() -> bool:
                        return "begun" in str(await events_of(terminals, terminal.name))

                    await until(written, "it is recorded while it is open", 60)
                    process.kill()
                    await until(lambda: gone(pid), "its input ended, and so it did", 60)
                    await process.start()

                    async def lost() -> bool:
                        return (await terminals.get(terminal.name)).end_reason == pb.Terminal.LOST

                    await until(lost, "the next run says what became of it", 60)
                    assert "begun" in str(await events_of(terminals, terminal.name))
        finally:
            process.kill()
