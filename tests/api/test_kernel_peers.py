"""Asking the registry who calls, sending it what was done, and finding it away."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2

from ekiben import errors
from ekiben.channel import open_channel
from ekiben.deployer.v1 import deployer_pb2, deployer_pb2_grpc
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1 import identity_pb2_grpc as stubs
from services.kernel.app import Component, Servicer
from services.kernel.clock import ManualClock
from services.kernel.identity import AuditRecord, current_principal
from services.kernel.peers import Peers, RemoteAuditor, RemoteAuthenticator, open_peers
from services.kernel.settings import PeerSettings
from tests.fixtures_kernel import Running, Tokens, run_server, short_path, until

__all__ = ["short_path"]


class Accounts(stubs.AccountsServicer):
    """The registry's side of Authenticate."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.asked = 0

    async def Authenticate(self, request: pb.AuthenticateRequest, context: Any) -> pb.Principal:
        self.asked += 1
        p = await self.tokens.authenticate(request.token)
        return pb.Principal(
            user=p.user,
            organization=p.organization,
            role=p.role,  # type: ignore[arg-type]
            api_token=p.api_token,
            api_token_display_name=p.api_token_display_name,
        )

    async def GetCaller(self, request: pb.GetCallerRequest, context: Any) -> pb.Principal:
        return pb.Principal(user=current_principal().user)


class Audit(stubs.AuditServicer):
    """The registry's side of RecordAuditEntries."""

    def __init__(self) -> None:
        self.entries: list[pb.AuditEntry] = []
        self.away = False

    async def RecordAuditEntries(self, request: pb.RecordAuditEntriesRequest, context: Any) -> empty_pb2.Empty:
        if self.away:
            raise errors.FailedPrecondition("Not now.")
        self.entries.extend(request.audit_entries)
        return empty_pb2.Empty()


class Registry:
    """A registry that runs, with peers that dial it."""

    def __init__(self, running: Running, accounts: Accounts, audit: Audit, peers: Peers) -> None:
        self.running, self.accounts, self.audit, self.peers = running, accounts, audit, peers


@pytest.fixture
async def registry(short_path: Path) -> AsyncIterator[Registry]:
    accounts, audit = Accounts(Tokens()), Audit()
    component = Component(
        "registry",
        [
            Servicer("ekiben.identity.v1.Accounts", stubs.add_AccountsServicer_to_server, accounts),
            Servicer("ekiben.identity.v1.Audit", stubs.add_AuditServicer_to_server, audit),
        ],
    )
    async with run_server(short_path, component) as running, open_peers(running.peers, caller="builder") as peers:
        yield Registry(running, accounts, audit, peers)


async def test_an_answer_is_kept_for_five_seconds_and_no_longer(registry: Registry, manual_clock: ManualClock) -> None:
    authenticator = RemoteAuthenticator(registry.peers.registry, manual_clock)
    expected = registry.accounts.tokens.known["ekb_dev"]
    for _ in range(3):
        assert await authenticator.authenticate("ekb_dev") == expected
    assert registry.accounts.asked == 1
    del registry.accounts.tokens.known["ekb_dev"]
    await manual_clock.advance(4.9)
    assert await authenticator.authenticate("ekb_dev") == expected
    await manual_clock.advance(0.1)
    with pytest.raises(errors.Unauthenticated):
        await authenticator.authenticate("ekb_dev")
    assert registry.accounts.asked == 2


async def test_a_refusal_is_kept_for_one_second(registry: Registry, manual_clock: ManualClock) -> None:
    authenticator = RemoteAuthenticator(registry.peers.registry, manual_clock)
    for _ in range(3):
        with pytest.raises(errors.Unauthenticated) as caught:
            await authenticator.authenticate("ekb_new")
        assert caught.value.reason == "TOKEN_INVALID"
    assert registry.accounts.asked == 1
    registry.accounts.tokens.known["ekb_new"] = registry.accounts.tokens.known["ekb_dev"]
    await manual_clock.advance(1)
    assert (await authenticator.authenticate("ekb_new")).user == "users/dev"


def _entry(clock: ManualClock, detail: str) -> AuditRecord:
    return AuditRecord(
        time=clock.now(), user="users/a", organization="organizations/default", method="m", outcome="OK", detail=detail
    )


async def test_entries_wait_while_the_registry_is_away_and_arrive_in_order(
    registry: Registry, manual_clock: ManualClock
) -> None:
    auditor = RemoteAuditor(registry.peers.registry, manual_clock)
    loop = asyncio.create_task(auditor.run())
    registry.audit.away = True
    for i in range(300):
        await auditor.record(_entry(manual_clock, str(i)))
    await until(lambda: manual_clock.sleepers, "a failed sending")
    registry.audit.away = False
    await manual_clock.advance(1)
    await until(lambda: len(registry.audit.entries) == 300, "all entries")
    assert [entry.detail for entry in registry.audit.entries] == [str(i) for i in range(300)]
    assert registry.audit.entries[0].create_time.ToDatetime() == manual_clock.now().replace(tzinfo=None) - _second()
    loop.cancel()
    await auditor.close()


def _second() -> Any:
    from datetime import timedelta

    return timedelta(seconds=1)


async def test_the_rest_is_sent_at_the_end(registry: Registry, manual_clock: ManualClock) -> None:
    auditor = RemoteAuditor(registry.peers.registry, manual_clock)
    await auditor.record(_entry(manual_clock, "last"))
    await auditor.close()
    assert [entry.detail for entry in registry.audit.entries] == ["last"]


async def test_what_cannot_be_sent_is_logged(
    registry: Registry, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    auditor = RemoteAuditor(registry.peers.registry, manual_clock)
    registry.audit.away = True
    await auditor.record(_entry(manual_clock, "last"))
    with caplog.at_level(logging.ERROR):
        await auditor.close()
    assert any("last" in str(vars(record).get("entry")) for record in caplog.records)


async def test_a_service_without_a_registry_of_its_own_asks_the_registry(
    registry: Registry, tmp_path: Path, short_path: Path
) -> None:
    """The whole: a second process's chain knows the caller and sends the refusal to the registry's audit log."""
    other = Component(
        "other",
        [Servicer("ekiben.identity.v1.Accounts", stubs.add_AccountsServicer_to_server, Accounts(Tokens()))],
    )
    folder = short_path / "other"
    folder.mkdir()
    async with run_server(folder, other, peers=registry.peers) as running:
        async with open_channel(running.address, token="ekb_viewer") as channel:
            stub = stubs.AccountsStub(channel)
            assert (await stub.GetCaller(pb.GetCallerRequest())).user == "users/viewer"
            with pytest.raises(errors.PermissionDenied):
                await stub.Authenticate(pb.AuthenticateRequest(token="x"))
        await until(lambda: registry.audit.entries, "the refusal")
    assert [(entry.user, entry.outcome) for entry in registry.audit.entries] == [("users/viewer", "PERMISSION_DENIED")]


async def test_a_call_waits_through_a_restart_of_its_peer(short_path: Path) -> None:
    accounts = Accounts(Tokens())
    component = Component(
        "registry", [Servicer("ekiben.identity.v1.Accounts", stubs.add_AccountsServicer_to_server, accounts)]
    )
    async with run_server(short_path, component) as running:
        settings = running.peers
        peers = Peers(settings, "builder")
        await stubs.AccountsStub(peers.registry).Authenticate(pb.AuthenticateRequest(token="ekb_dev"))
    call = asyncio.ensure_future(
        stubs.AccountsStub(peers.registry).Authenticate(pb.AuthenticateRequest(token="ekb_dev"))
    )
    await asyncio.sleep(0)
    async with run_server(short_path, component):
        assert (await call).user == "users/dev"
    await peers.close()


class Deployments(deployer_pb2_grpc.DeploymentsServicer):
    """One of several, which says who it is."""

    def __init__(self, name: str) -> None:
        self.name, self.standby, self.left = name, "Another is to be called.", asyncio.Event()
        self.leaves = asyncio.Event()

    async def GetDeployment(self, request: Any, context: Any) -> deployer_pb2.Deployment:
        return deployer_pb2.Deployment(name=self.name)

    async def drain(self) -> None:
        self.leaves.set()
        await self.left.wait()
        self.standby = "Another has it."

    def component(self) -> Component:
        add = deployer_pb2_grpc.add_DeploymentsServicer_to_server
        servicer = Servicer("ekiben.deployer.v1.Deployments", add, self)
        return Component("deployer", [servicer], standby=lambda: self.standby, drain=self.drain)


async def test_of_deployers_at_one_name_the_one_that_has_the_cluster_is_called(short_path: Path) -> None:
    for name in ("one", "two"):
        (short_path / name).mkdir()
    one, two = Deployments("one"), Deployments("two")
    one.standby = ""
    async with run_server(short_path / "one", one.component(), listen="127.0.0.1:0") as first:
        port = first.address.rpartition(":")[2]
        async with run_server(short_path / "two", two.component(), listen=f"127.0.0.2:{port}") as second:
            both = f"ipv4:127.0.0.2:{port},{first.address}"
            settings = PeerSettings(service_token_file=first.settings.service_token_file, deployer=both)
            async with open_peers(settings, caller="gateway") as peers:
                stub = deployer_pb2_grpc.DeploymentsStub(peers.deployer)

                async def asked() -> str:
                    try:
                        return (await stub.GetDeployment(deployer_pb2.GetDeploymentRequest(), timeout=10)).name
                    except errors.Unavailable:  # while neither has it
                        return ""

                async def answers(name: str) -> bool:
                    return await asked() == name

                assert {await asked() for _ in range(20)} == {"one"}
                one.standby, two.standby = two.standby, ""
                await until(lambda: answers("two"), "the other one to be called", 30)
                await until(lambda: answers("two") if one.standby else None, "and it alone", 30)
                assert {await asked() for _ in range(20)} == {"two"}
                second.stop.set()
                await two.leaves.wait()
                # It has the cluster until it gives that up.
                assert {await asked() for _ in range(20)} == {"two"}
                one.standby = ""
                two.left.set()
                await until(lambda: answers("one"), "the first one to be called again", 30)
            assert first.task is not None and not first.task.done()
        one.left.set()


async def test_a_peer_that_is_away_is_unavailable_soon_rather_than_at_the_deadline(short_path: Path) -> None:
    (short_path / "t").write_text("eks_x")
    settings = PeerSettings(service_token_file=short_path / "t", registry=f"unix:{short_path}/none")
    async with open_peers(settings, caller="builder") as peers:
        async with asyncio.timeout(10):
            with pytest.raises(errors.Unavailable) as caught:
                await stubs.AccountsStub(peers.registry).CreateUser(pb.CreateUserRequest())
        assert caught.value.reason == "SERVER_UNREACHABLE"
        with pytest.raises(errors.FailedPrecondition) as unset:
            _ = peers.builder
        assert "EKIBEN_PEERS_BUILDER" in unset.value.message


async def test_services_with_different_tokens_say_so_instead_of_blaming_the_caller(
    registry: Registry, manual_clock: ManualClock, short_path: Path
) -> None:
    (short_path / "other-token").write_text("eks_another")
    settings = PeerSettings(service_token_file=short_path / "other-token", registry=registry.running.address)
    async with open_peers(settings, caller="builder") as peers:
        with pytest.raises(errors.Unavailable) as caught:
            await RemoteAuthenticator(peers.registry, manual_clock).authenticate("ekb_dev")
    assert caught.value.reason == "SERVICE_TOKEN_MISMATCH"
