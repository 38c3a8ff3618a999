"""What happens around a call: identity, policy, errors, deadlines, audit, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from ekiben import errors
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.channel import from_rpc_error, open_channel
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1 import identity_pb2_grpc as stubs
from services.kernel.app import Component, Servicer
from services.kernel.identity import current_caller, current_principal
from services.kernel.peers import Peers, on_behalf_of, with_token
from services.kernel.policies import Policy, policy_of
from tests.fixtures_kernel import SERVICE_TOKEN, Running, run_server, short_path, until

__all__ = ["short_path"]


class Accounts(stubs.AccountsServicer):
    """Answers as the test needs."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.ended = asyncio.Event()

    async def GetCaller(self, request: pb.GetCallerRequest, context: Any) -> pb.Principal:
        principal, caller = current_principal(), current_caller()
        assert caller is not None
        return pb.Principal(
            user=principal.user,
            organization=principal.organization,
            role=principal.role,  # type: ignore[arg-type]
            api_token=caller.request_id,
            api_token_display_name=caller.peer,
        )

    async def Authenticate(self, request: pb.AuthenticateRequest, context: Any) -> pb.Principal:
        if request.token == "of a stranger":
            raise errors.Unauthenticated("The token is not known.", reason="TOKEN_INVALID")
        return await self.GetCaller(pb.GetCallerRequest(), context)

    async def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.User:
        match request.name:
            case "users/bug":
                raise RuntimeError("the password is hunter2")
            case "users/abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "said by hand")
            case "users/cancelled-inside":
                raise asyncio.CancelledError
            case "users/slow":
                self.entered.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    self.ended.set()
        raise errors.NotFound(
            f"User {request.name!r} does not exist.", reason="USER_NOT_FOUND", user=request.name, retry_after_s=2
        )

    async def CreateUser(self, request: pb.CreateUserRequest, context: Any) -> pb.User:
        if request.user.first_name == "slow":
            self.entered.set()
            await asyncio.sleep(60)
        if request.user.first_name == "bad":
            raise errors.InvalidArgument("No.", reason="USER_INVALID")
        if request.user.first_name == "denied":
            raise errors.PermissionDenied("Not this one.", reason="ROLE_TOO_HIGH")
        return request.user


class Logins(stubs.LoginsServicer):
    """Open to anyone."""

    async def CreateLogin(self, request: pb.CreateLoginRequest, context: Any) -> pb.Login:
        return pb.Login(code=current_principal().user or "nobody")


def component(accounts: Accounts) -> Component:
    return Component(
        "registry",
        [
            Servicer("ekiben.identity.v1.Accounts", stubs.add_AccountsServicer_to_server, accounts),
            Servicer("ekiben.identity.v1.Logins", stubs.add_LoginsServicer_to_server, Logins()),
        ],
    )


@pytest.fixture
async def accounts() -> Accounts:
    return Accounts()


@pytest.fixture
async def running(short_path: Path, accounts: Accounts) -> AsyncIterator[Running]:
    async with run_server(short_path, component(accounts)) as server:
        yield server


@pytest.mark.parametrize(
    ("token", "reason"), [(None, "TOKEN_MISSING"), ("ekb_unknown", "TOKEN_INVALID"), ("eks_x", "SERVICE_TOKEN_INVALID")]
)
async def test_without_a_token_that_works_a_call_is_unauthenticated_and_audited(
    running: Running, token: str | None, reason: str
) -> None:
    async with open_channel(running.address, token=token) as channel:
        with pytest.raises(errors.Unauthenticated) as caught:
            await stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/a"))
    assert caught.value.reason == reason
    entry = running.audit.entries[0]
    assert (entry.method, entry.outcome) == ("ekiben.identity.v1.Accounts/GetUser", "UNAUTHENTICATED")
    assert (entry.user, entry.resource, entry.request_id) == ("", "users/a", caught.value.request_id)
    assert reason in entry.detail and len(entry.trace_id) == 32


async def test_a_role_too_low_is_denied_before_existence_is_looked_at(running: Running) -> None:
    async with open_channel(running.address, token="ekb_dev") as channel:
        with pytest.raises(errors.PermissionDenied) as caught:
            await stubs.AccountsStub(channel).CreateUser(pb.CreateUserRequest(user=pb.User(name="users/new")))
    assert caught.value.reason == "ROLE_TOO_LOW"
    assert caught.value.metadata["needed_role"] == "ROLE_ADMIN"
    (entry,) = running.audit.entries
    assert (entry.user, entry.api_token, entry.resource) == ("users/dev", "apiTokens/dev", "users/new")
    assert entry.outcome == "PERMISSION_DENIED"


async def test_an_admin_is_no_service(running: Running) -> None:
    async with open_channel(running.address, token="ekb_admin") as channel:
        with pytest.raises(errors.PermissionDenied):
            await stubs.AccountsStub(channel).Authenticate(pb.AuthenticateRequest(token="x"))


@pytest.mark.parametrize(
    ("token", "user"), [(None, "nobody"), ("ekb_unknown", "nobody"), ("ekb_viewer", "users/viewer")]
)
async def test_a_method_open_to_anyone_ignores_a_bad_token_and_knows_a_good_one(
    running: Running, token: str | None, user: str
) -> None:
    async with open_channel(running.address, token=token) as channel:
        login = await stubs.LoginsStub(channel).CreateLogin(pb.CreateLoginRequest())
    assert login.code == user
    assert running.audit.entries == []


async def test_bentomls_header_carries_a_token_too(running: Running) -> None:
    async with open_channel(running.address) as channel:
        caller = await stubs.AccountsStub(channel).GetCaller(
            pb.GetCallerRequest(), metadata=(("x-yatai-api-token", "ekb_viewer"),)
        )
    assert caller.user == "users/viewer"


async def test_a_peer_is_a_service_and_may_speak_for_a_user(running: Running) -> None:
    peers = Peers(running.peers, "builder")
    stub = stubs.AccountsStub(peers.registry)
    caller = await stub.Authenticate(pb.AuthenticateRequest())
    assert (caller.user, caller.role) == ("services/builder", Role.ROLE_SERVICE)
    with on_behalf_of(running.tokens.known["ekb_dev"]):
        caller = await stub.Authenticate(pb.AuthenticateRequest())
    assert (caller.user, caller.organization, caller.role) == ("users/dev", "organizations/default", Role.ROLE_SERVICE)
    await peers.close()


async def test_a_token_that_a_service_asks_about_is_refused_to_a_stranger(running: Running) -> None:
    """Else anybody could fill the disk with entries through a service that checks tokens: a service's are not limited."""
    peers = Peers(running.peers, "builder")
    with pytest.raises(errors.Unauthenticated):
        await stubs.AccountsStub(peers.registry).Authenticate(pb.AuthenticateRequest(token="of a stranger"))
    await peers.close()
    (entry,) = running.audit.entries
    assert (entry.user, entry.outcome, entry.detail.partition(":")[0]) == ("", "UNAUTHENTICATED", "TOKEN_INVALID")


async def test_a_user_cannot_claim_to_be_another(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        caller = await stubs.AccountsStub(channel).GetCaller(
            pb.GetCallerRequest(), metadata=(("ekiben-user", "users/admin"), ("ekiben-service", "gateway"))
        )
    assert (caller.user, caller.role) == ("users/viewer", Role.ROLE_VIEWER)


async def test_a_front_lends_nobody_its_service_token(running: Running) -> None:
    peers = Peers(running.peers, "gateway")
    stub = stubs.AccountsStub(peers.registry)
    with with_token(""):
        with pytest.raises(errors.Unauthenticated):
            await stub.GetCaller(pb.GetCallerRequest())
    with with_token("ekb_viewer"):
        assert (await stub.GetCaller(pb.GetCallerRequest())).user == "users/viewer"
    explicit = await stub.GetCaller(pb.GetCallerRequest(), metadata=(("authorization", "Bearer ekb_dev"),))
    assert explicit.user == "users/dev"
    await peers.close()


async def test_a_token_that_no_header_can_hold_is_unauthenticated_not_a_crash(running: Running) -> None:
    peers = Peers(running.peers, "gateway")
    for token in ("a\nb", "a\x00", "ключ"):
        with with_token(token), pytest.raises(errors.Unauthenticated) as caught:
            await stubs.AccountsStub(peers.registry).GetCaller(pb.GetCallerRequest())
        assert caught.value.reason == "TOKEN_INVALID"
        with pytest.raises(errors.Unauthenticated):
            open_channel(running.address, token=token)
    await peers.close()


async def test_an_error_arrives_as_the_class_that_was_raised(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        call = stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/a"))
        with pytest.raises(errors.NotFound) as caught:
            await call
        assert await call.code() is grpc.StatusCode.NOT_FOUND
        trailers = dict(await call.trailing_metadata())
    error = caught.value
    assert (error.reason, error.metadata, error.retry_after_s) == ("USER_NOT_FOUND", {"user": "users/a"}, 2)
    assert trailers["x-request-id"] == error.request_id


async def test_a_bug_is_internal_with_fixed_text_and_the_traceback_in_the_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        with pytest.raises(errors.Internal) as caught:
            await stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/bug"))
    assert "hunter2" not in str(caught.value) and caught.value.request_id in str(caught.value)
    assert "hunter2" in caplog.text and "Traceback" in caplog.text


async def test_what_a_servicer_aborts_by_hand_passes(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        with pytest.raises(errors.DataLoss, match="said by hand"):
            await stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/abort"))


async def test_a_cancellation_that_surfaces_inside_is_unavailable_not_silence(running: Running) -> None:
    async with aio.insecure_channel(running.address) as channel:  # a plain channel, which does not retry
        with pytest.raises(aio.AioRpcError) as caught:
            await stubs.AccountsStub(channel).GetUser(
                pb.GetUserRequest(name="users/cancelled-inside"),
                timeout=5,
                metadata=(("authorization", "Bearer ekb_viewer"),),
            )
    error = from_rpc_error(caught.value)
    assert (type(error), error.reason) == (errors.Unavailable, "WORK_CANCELLED")


async def test_a_method_that_nobody_wrote_is_unimplemented(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        with pytest.raises(errors.Unimplemented) as caught:
            await stubs.AccountsStub(channel).ListUsers(pb.ListUsersRequest())
        assert caught.value.reason == "METHOD_UNIMPLEMENTED"
        with pytest.raises(errors.Unimplemented):
            await stubs.SecretsStub(channel).ListSecrets(pb.ListSecretsRequest())


@pytest.mark.parametrize("payload", [b"\xff\xff", b"\x0a\x02\xff\xfe"], ids=["wire", "utf8"])
async def test_bytes_that_are_no_message_are_the_callers_mistake(running: Running, payload: bytes) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        call = channel.unary_unary("/ekiben.identity.v1.Accounts/GetUser", bytes, bytes)
        with pytest.raises(errors.InvalidArgument) as caught:
            await call(payload)
    assert caught.value.reason == "MESSAGE_MALFORMED"


async def test_a_message_above_the_limit_is_refused_clearly(running: Running) -> None:
    async with aio.insecure_channel(running.address) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await stubs.AccountsStub(channel).GetUser(
                pb.GetUserRequest(name="x" * (17 << 20)), metadata=(("authorization", "Bearer ekb_viewer"),)
            )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_servers_own_sentence_arrives_before_the_callers_deadline(
    running: Running, accounts: Accounts
) -> None:
    async def told() -> bool:
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/slow"), timeout=0.3)
        return "did not finish within the time" in str(caught.value)

    async with open_channel(running.address, token="ekb_viewer") as channel:
        # On a machine that is busy for longer than the margin of 20 ms the caller's own clock may win.
        await until(told, "the server's sentence", seconds=20)
    assert accounts.ended.is_set()


async def test_the_channels_default_deadline_holds_when_a_call_sets_none(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer", timeout_s=0.2) as channel:
        with pytest.raises(errors.DeadlineExceeded):
            await stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/slow"))


async def test_a_client_that_cancels_ends_the_servicer(running: Running, accounts: Accounts) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        call = stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/slow"))
        await asyncio.wait_for(accounts.entered.wait(), 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(accounts.ended.wait(), 5)


async def test_an_audited_call_leaves_an_entry_and_one_that_failed_none(running: Running) -> None:
    async with open_channel(running.address, token="ekb_admin") as channel:
        stub = stubs.AccountsStub(channel)
        await stub.CreateUser(pb.CreateUserRequest(user=pb.User(name="users/new")))
        with pytest.raises(errors.InvalidArgument):
            await stub.CreateUser(pb.CreateUserRequest(user=pb.User(name="users/new", first_name="bad")))
        await stub.GetCaller(pb.GetCallerRequest())
    (entry,) = running.audit.entries
    assert (entry.user, entry.outcome, entry.resource) == ("users/admin", "OK", "users/new")


async def test_a_refusal_by_the_servicer_is_audited_too(running: Running) -> None:
    async with open_channel(running.address, token="ekb_admin") as channel:
        with pytest.raises(errors.PermissionDenied):
            await stubs.AccountsStub(channel).CreateUser(
                pb.CreateUserRequest(user=pb.User(name="users/x", first_name="denied"))
            )
    assert [(e.outcome, e.detail) for e in running.audit.entries] == [
        ("PERMISSION_DENIED", "ROLE_TOO_HIGH: Not this one.")
    ]


async def test_an_audited_call_that_its_client_left_is_written_down_as_cancelled(
    running: Running, accounts: Accounts
) -> None:
    async with open_channel(running.address, token="ekb_admin") as channel:
        call = stubs.AccountsStub(channel).CreateUser(
            pb.CreateUserRequest(user=pb.User(name="users/x", first_name="slow"))
        )
        await asyncio.wait_for(accounts.entered.wait(), 5)
        call.cancel()
        await until(lambda: running.audit.entries, "an audit entry")
    assert running.audit.entries[0].outcome == "CANCELLED"


async def test_a_request_id_is_kept_when_it_is_one_and_made_when_not(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        stub = stubs.AccountsStub(channel)
        kept = await stub.GetCaller(pb.GetCallerRequest(), metadata=(("x-request-id", "abc-1"),))
        made = await stub.GetCaller(pb.GetCallerRequest(), metadata=(("x-request-id", "a b c"),))
    assert kept.api_token == "abc-1"
    assert len(made.api_token) == 32


async def test_the_callers_address_is_the_one_that_the_gateway_saw(running: Running) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        caller = await stubs.AccountsStub(channel).GetCaller(
            pb.GetCallerRequest(), metadata=(("x-forwarded-for", "6.6.6.6, 192.0.2.7"),)
        )
    assert caller.api_token_display_name == "192.0.2.7"


async def test_a_request_id_goes_on_to_the_next_hop(running: Running) -> None:
    from services.kernel.identity import Caller, set_caller

    peers = Peers(running.peers, "gateway")
    set_caller(Caller(request_id="outer-1"))
    caller = await stubs.AccountsStub(peers.registry).Authenticate(pb.AuthenticateRequest())
    set_caller(None)
    assert caller.api_token == "outer-1"
    await peers.close()


def test_policies_come_from_the_protos_and_what_has_none_is_refused() -> None:
    assert policy_of("ekiben.identity.v1.Accounts/CreateUser") == Policy(
        Role.ROLE_ADMIN, True, request_type="ekiben.identity.v1.CreateUserRequest"
    )
    assert policy_of("ekiben.identity.v1.Accounts/Nothing").role == Role.ROLE_UNSPECIFIED
    assert policy_of("somebody.else.v1.Service/Do").role == Role.ROLE_UNSPECIFIED
    assert policy_of("opentelemetry.proto.collector.trace.v1.TraceService/Export").role == Role.ROLE_SERVICE


def test_every_method_of_the_suite_has_a_policy() -> None:
    from ekiben.builder.v1 import builder_pb2
    from ekiben.deployer.v1 import deployer_pb2
    from ekiben.recorder.v1 import recorder_pb2
    from ekiben.registry.v1 import registry_pb2

    for api in (pb, builder_pb2, deployer_pb2, recorder_pb2, registry_pb2):
        for service in api.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert policy_of(f"{service.full_name}/{method.name}").role, method.full_name


async def test_the_service_token_is_worth_nothing_with_a_letter_more(running: Running) -> None:
    async with open_channel(running.address, token=SERVICE_TOKEN + "x") as channel:
        with pytest.raises(errors.Unauthenticated):
            await stubs.AccountsStub(channel).Authenticate(pb.AuthenticateRequest())
