"""Users, API tokens, logins, secrets and the audit log, as clients see them."""

import base64
import stat
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
import sqlalchemy as sa
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import (
    Aborted,
    AlreadyExists,
    EkibenError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from ekiben.identity.v1 import identity_pb2 as ipb
from ekiben.registry.v1 import registry_pb2 as pb
from services.kernel.clock import ManualClock, SystemClock
from services.kernel.db import open_database
from services.kernel.endings import NotStarted
from services.registry.known import KNOWN_S, Found, KnownTokens
from tests.fixtures_registry import (
    SERVICE_TOKEN,
    Registry,
    Stubs,
    run_registry,
    running_registry,  # noqa: F401
    until,
)

VIEWER, DEVELOPER, ADMIN = Role.ROLE_VIEWER, Role.ROLE_DEVELOPER, Role.ROLE_ADMIN


class ShiftedClock(SystemClock):
    """The system's clock, set forward by a test."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        """The time, ahead."""
        return super().now() + self.ahead


async def refused(call: Awaitable[object], cls: type[EkibenError], reason: str) -> EkibenError:
    with pytest.raises(cls) as caught:
        await call
    assert caught.value.reason == reason
    return caught.value


async def new_token(stubs: Stubs, **fields: object) -> ipb.ApiToken:
    token = ipb.ApiToken(**({"display_name": "t"} | fields))  # type: ignore[arg-type]
    return await stubs.accounts.CreateApiToken(ipb.CreateApiTokenRequest(api_token=token))


async def whoami(stubs: Stubs) -> ipb.Principal:
    return await stubs.accounts.GetCaller(ipb.GetCallerRequest())


async def everything_in(url: str) -> str:
    """Every row of every table, and what else a SQLite file holds."""
    async with open_database(url) as database, database.read() as connection:
        names = await connection.run_sync(lambda c: sa.inspect(c).get_table_names())
        rows = [repr(row) for name in names for row in await connection.execute(sa.text(f"SELECT * FROM {name}"))]
    file = Path(url.removeprefix("sqlite:///"))
    files = [path.read_bytes().decode("latin-1") for path in file.parent.glob(f"{file.name}*")] if file.exists() else []
    return "\n".join([*names, *rows, *files])


async def test_the_first_start_makes_an_admin(running: Registry) -> None:
    path = running.settings.admin_token_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caller = await whoami(running.admin)
    assert (caller.user, caller.organization, caller.role) == ("users/admin", "organizations/default", ADMIN)
    organization = await running.admin.accounts.GetOrganization(ipb.GetOrganizationRequest(name="organizations/-"))
    assert organization.name == "organizations/default"
    await refused(
        running.admin.accounts.GetOrganization(ipb.GetOrganizationRequest(name="organizations/other")),
        NotFound,
        "ORGANIZATION_NOT_FOUND",
    )


async def test_a_registry_with_another_key_file_does_not_start(tmp_path: Path) -> None:
    async with run_registry(tmp_path) as running:
        secret = ipb.Secret(
            name="secrets/s", kind=ipb.Secret.ENV, stage=ipb.Secret.RUNTIME, items=[ipb.Secret.Item(key="A", value="b")]
        )
        await running.admin.secrets.CreateSecret(ipb.CreateSecretRequest(secret=secret))
    other = tmp_path / "other-key"
    other.write_text(f"kother:{base64.b64encode(bytes(32)).decode()}\n")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with run_registry(tmp_path, secrets_key_file=other):
            pass
    assert "has none of the keys" in str(caught.value.exceptions[0])


async def test_the_admin_token_is_kept_and_made_again_when_its_file_is_gone(tmp_path: Path) -> None:
    async with run_registry(tmp_path) as running:
        first = running.settings.admin_token_file.read_text()
    async with run_registry(tmp_path) as running:
        assert running.settings.admin_token_file.read_text() == first
        assert (await whoami(running.admin)).role == ADMIN
    running.settings.admin_token_file.unlink()
    async with run_registry(tmp_path) as running:
        assert running.settings.admin_token_file.read_text() != first
        assert (await whoami(running.admin)).role == ADMIN
        await refused(whoami(running.stubs(first.strip())), Unauthenticated, "TOKEN_INVALID")
        tokens = await running.admin.accounts.ListApiTokens(ipb.ListApiTokensRequest())
        assert tokens.total_size == 1


async def test_an_admin_token_of_another_file_is_another_token(tmp_path: Path) -> None:
    async with run_registry(tmp_path) as running:
        first = running.settings.admin_token_file.read_text()
    other = tmp_path / "another machine" / "admin-token"
    async with run_registry(tmp_path, admin_token_file=other) as running:
        assert other.read_text() != first
        for token in (first, other.read_text()):
            assert (await whoami(running.stubs(token.strip()))).role == ADMIN


async def test_a_token_file_older_than_the_database_is_taken(tmp_path: Path) -> None:
    (tmp_path / "admin-token").write_text("ekb_" + "a" * 43)
    async with run_registry(tmp_path) as running:
        assert (await whoami(running.admin)).user == "users/admin"


async def test_tokens_are_kept_as_hashes(running: Registry) -> None:
    created = await new_token(running.admin, description="d", scopes=["api", "read_cluster"])
    assert created.token.startswith("ekb_")
    read = await running.admin.accounts.GetApiToken(ipb.GetApiTokenRequest(name=created.name))
    assert read.token == ""
    assert list(read.scopes) == ["api", "read_cluster"]
    dump = await everything_in(running.settings.database_url)
    assert created.name.removeprefix("apiTokens/") in dump
    assert created.token not in dump
    assert running.settings.admin_token_file.read_text().strip() not in dump


async def test_roles_are_the_least_of_user_and_token(running: Registry) -> None:
    viewer = await running.stubs_of_role("vera", VIEWER)
    assert (await whoami(viewer)).role == VIEWER
    own = await new_token(viewer)
    assert own.role == VIEWER
    await refused(new_token(viewer, role=DEVELOPER), PermissionDenied, "ROLE_TOO_HIGH")
    await refused(new_token(viewer, user="users/admin"), PermissionDenied, "NOT_OWN_TOKEN")
    narrow = running.stubs((await new_token(running.admin, role=VIEWER)).token)
    assert (await whoami(narrow)).role == VIEWER
    # A narrow token of an admin makes none that is wider than itself.
    assert (await new_token(narrow)).role == VIEWER
    await refused(new_token(narrow, role=ADMIN), PermissionDenied, "ROLE_TOO_HIGH")
    await refused(new_token(running.admin, user="users/vera", role=ADMIN), PermissionDenied, "ROLE_TOO_HIGH")
    await refused(new_token(running.admin, role=Role.ROLE_SERVICE), InvalidArgument, "ROLE_INVALID")
    demoted = ipb.UpdateUserRequest(user=ipb.User(name="users/vera", role=ADMIN), update_mask=FieldMask(paths=["role"]))
    await running.admin.accounts.UpdateUser(demoted)
    assert (await whoami(viewer)).role == VIEWER  # its token stays what it was made as


async def test_others_tokens_are_an_admins_business(running: Registry) -> None:
    viewer = await running.stubs_of_role("vera", VIEWER)
    mine, theirs = await new_token(viewer), await new_token(running.admin)
    listed = await viewer.accounts.ListApiTokens(ipb.ListApiTokensRequest())
    assert {token.user for token in listed.api_tokens} == {"users/vera"}
    assert listed.total_size == 2
    everything = await running.admin.accounts.ListApiTokens(ipb.ListApiTokensRequest(page_size=2))
    assert everything.total_size == 4
    assert everything.next_page_token
    assert [token.name for token in everything.api_tokens] == [theirs.name, mine.name]
    for call in (
        viewer.accounts.GetApiToken(ipb.GetApiTokenRequest(name=theirs.name)),
        viewer.accounts.DeleteApiToken(ipb.DeleteApiTokenRequest(name=theirs.name)),
    ):
        await refused(call, NotFound, "API_TOKEN_NOT_FOUND")
    await running.admin.accounts.DeleteApiToken(ipb.DeleteApiTokenRequest(name=mine.name))
    await refused(whoami(running.stubs(mine.token)), Unauthenticated, "TOKEN_INVALID")


async def test_a_token_may_delete_itself(running: Registry) -> None:
    token = await new_token(running.admin)
    self_made = running.stubs(token.token)
    await self_made.accounts.DeleteApiToken(ipb.DeleteApiTokenRequest(name=token.name))
    await refused(whoami(self_made), Unauthenticated, "TOKEN_INVALID")
    assert (await whoami(running.admin)).role == ADMIN


async def test_tokens_expire_and_users_are_disabled(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with run_registry(tmp_path, clock=clock) as running:
        await refused(
            new_token(running.admin, expire_time=datetime.now(UTC) - timedelta(days=1)),
            InvalidArgument,
            "EXPIRE_TIME_INVALID",
        )
        created = await new_token(running.admin, expire_time=datetime.now(UTC) + timedelta(hours=1))
        late = running.stubs(created.token)
        await whoami(late)
        clock.ahead = timedelta(hours=2)
        await refused(whoami(late), Unauthenticated, "TOKEN_EXPIRED")
        viewer = await running.stubs_of_role("vera", VIEWER)
        disable = ipb.UpdateUserRequest(user=ipb.User(name="users/vera", disabled=True))
        await running.admin.accounts.UpdateUser(disable)
        await refused(whoami(viewer), Unauthenticated, "USER_DISABLED")
        enable = ipb.UpdateUserRequest(user=ipb.User(name="users/vera"), update_mask=FieldMask(paths=["disabled"]))
        await running.admin.accounts.UpdateUser(enable)
        assert (await whoami(viewer)).user == "users/vera"


async def test_changes_count_at_once_though_tokens_are_remembered(running: Registry) -> None:
    dora = await running.stubs_of_role("dora", DEVELOPER)
    accounts = running.admin.accounts
    assert (await whoami(dora)).role == DEVELOPER
    await accounts.UpdateUser(ipb.UpdateUserRequest(user=ipb.User(name="users/dora", role=VIEWER)))
    assert (await whoami(dora)).role == VIEWER
    created = await new_token(dora)
    await whoami(running.stubs(created.token))
    await accounts.DeleteApiToken(ipb.DeleteApiTokenRequest(name=created.name))
    await refused(whoami(running.stubs(created.token)), Unauthenticated, "TOKEN_INVALID")
    await accounts.DeleteUser(ipb.DeleteUserRequest(name="users/dora"))
    await refused(whoami(dora), Unauthenticated, "TOKEN_INVALID")


async def test_what_was_read_before_a_change_is_not_remembered_and_another_registrys_counts_soon() -> None:
    clock = ManualClock()
    known = KnownTokens(clock)
    old, new = cast("Found", ("old",)), cast("Found", ("new",))

    async def overtaken(_: str) -> Found:
        known.forget()
        return old

    async def ask(_: str) -> Found:
        return new

    async def never(_: str) -> Found:
        raise AssertionError

    assert await known.get("hash", overtaken) is old
    assert await known.get("hash", ask) is new
    assert await known.get("hash", never) is new
    await clock.advance(KNOWN_S)
    assert await known.get("hash", overtaken) is old


async def test_the_last_admin_stays(running: Registry) -> None:
    accounts = running.admin.accounts
    for update in (
        ipb.UpdateUserRequest(user=ipb.User(name="users/admin", role=VIEWER)),
        ipb.UpdateUserRequest(user=ipb.User(name="users/admin", disabled=True)),
    ):
        await refused(accounts.UpdateUser(update), FailedPrecondition, "LAST_ADMIN")
    delete = ipb.DeleteUserRequest(name="users/admin")
    await refused(accounts.DeleteUser(delete), FailedPrecondition, "LAST_ADMIN")
    second = await running.stubs_of_role("ada", ADMIN)
    await second.accounts.DeleteUser(delete)
    await refused(whoami(running.admin), Unauthenticated, "TOKEN_INVALID")
    await refused(second.accounts.DeleteUser(ipb.DeleteUserRequest(name="users/ada")), FailedPrecondition, "LAST_ADMIN")


async def test_users_are_made_changed_and_listed_by_admins(running: Registry) -> None:
    accounts = running.admin.accounts
    user = ipb.User(name="users/bob", role=DEVELOPER, email="b@x", first_name="B", last_name="Ob")
    created = await accounts.CreateUser(ipb.CreateUserRequest(user=user))
    assert (created.email, created.role) == ("b@x", DEVELOPER)
    await refused(accounts.CreateUser(ipb.CreateUserRequest(user=user)), AlreadyExists, "USER_EXISTS")
    nobody = ipb.CreateUserRequest(user=ipb.User(name="users/eve"))
    await refused(accounts.CreateUser(nobody), InvalidArgument, "ROLE_INVALID")
    changed = await accounts.UpdateUser(ipb.UpdateUserRequest(user=ipb.User(name="users/bob", email="c@x")))
    assert (changed.email, changed.first_name) == ("c@x", "B")
    stale = ipb.UpdateUserRequest(user=ipb.User(name="users/bob", email="d@x", etag=created.etag))
    await refused(accounts.UpdateUser(stale), Aborted, "ETAG_MISMATCH")
    page = await accounts.ListUsers(ipb.ListUsersRequest(page_size=1))
    assert [u.name for u in page.users] == ["users/admin"]
    rest = await accounts.ListUsers(ipb.ListUsersRequest(page_size=1, page_token=page.next_page_token))
    assert ([u.name for u in rest.users], rest.next_page_token) == (["users/bob"], "")
    await accounts.DeleteUser(ipb.DeleteUserRequest(name="users/bob"))
    await refused(accounts.GetUser(ipb.GetUserRequest(name="users/bob")), NotFound, "USER_NOT_FOUND")


async def test_a_login_gives_one_token_to_whoever_holds_the_code(running: Registry) -> None:
    anyone = running.stubs("")
    login = await anyone.logins.CreateLogin(ipb.CreateLoginRequest())
    redeem = ipb.RedeemLoginRequest(code=login.code)
    await refused(anyone.logins.RedeemLogin(redeem), FailedPrecondition, "LOGIN_PENDING")
    await refused(
        anyone.logins.ApproveLogin(ipb.ApproveLoginRequest(code=login.code)), Unauthenticated, "TOKEN_MISSING"
    )
    developer = await running.stubs_of_role("dev", DEVELOPER)
    approved = await developer.logins.ApproveLogin(ipb.ApproveLoginRequest(code=login.code))
    assert (approved.code, approved.token) == ("", "")
    await refused(
        running.admin.logins.ApproveLogin(ipb.ApproveLoginRequest(code=login.code)), NotFound, "LOGIN_NOT_FOUND"
    )
    token = (await anyone.logins.RedeemLogin(redeem)).token
    caller = await whoami(running.stubs(token))
    assert (caller.user, caller.role) == ("users/dev", DEVELOPER)
    await refused(anyone.logins.RedeemLogin(redeem), NotFound, "LOGIN_NOT_FOUND")
    await refused(anyone.logins.RedeemLogin(ipb.RedeemLoginRequest(code="guess")), NotFound, "LOGIN_NOT_FOUND")


async def test_a_login_expires(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with run_registry(tmp_path, clock=clock) as running:
        login = await running.stubs("").logins.CreateLogin(ipb.CreateLoginRequest())
        clock.ahead = timedelta(minutes=10, seconds=1)
        approve = ipb.ApproveLoginRequest(code=login.code)
        await refused(running.admin.logins.ApproveLogin(approve), NotFound, "LOGIN_NOT_FOUND")


def secret(name: str = "db", **fields: object) -> ipb.Secret:
    items = [ipb.Secret.Item(key="PASSWORD", value="hunter2-hunter2")]
    return ipb.Secret(**({"name": f"secrets/{name}", "items": items} | fields))  # type: ignore[arg-type]


async def test_secrets_are_sealed_and_write_only(running: Registry) -> None:
    created = await running.admin.secrets.CreateSecret(ipb.CreateSecretRequest(secret=secret(description="the db")))
    assert [(item.key, item.value) for item in created.items] == [("PASSWORD", "")]
    assert (created.kind, created.stage) == (ipb.Secret.ENV, ipb.Secret.ALL)
    read = await running.admin.secrets.GetSecret(ipb.GetSecretRequest(name="secrets/db"))
    assert read == created
    dump = await everything_in(running.settings.database_url)
    assert "PASSWORD" in dump
    assert "hunter2" not in dump
    assert b"hunter2".hex() not in dump.lower()
    reveal = ipb.RevealSecretsRequest(names=["secrets/db"])
    await refused(running.admin.secrets.RevealSecrets(reveal), PermissionDenied, "ROLE_TOO_LOW")
    service = running.stubs(SERVICE_TOKEN)
    assert (await service.secrets.RevealSecrets(reveal)).secrets[0].items[0].value == "hunter2-hunter2"
    missing = ipb.RevealSecretsRequest(names=["secrets/db", "secrets/none"])
    await refused(service.secrets.RevealSecrets(missing), NotFound, "SECRET_NOT_FOUND")
    update = ipb.UpdateSecretRequest(
        secret=ipb.Secret(name="secrets/db", items=[ipb.Secret.Item(key="A", value="1"), ipb.Secret.Item(key="B")])
    )
    updated = await running.admin.secrets.UpdateSecret(update)
    assert updated.description == "the db"
    revealed = (await service.secrets.RevealSecrets(reveal)).secrets[0]
    assert [(item.key, item.value) for item in revealed.items] == [("A", "1"), ("B", "")]
    listed = await running.admin.secrets.ListSecrets(ipb.ListSecretsRequest(filter="db"))
    assert (listed.total_size, listed.secrets[0].items[0].value) == (1, "")
    await running.admin.secrets.DeleteSecret(ipb.DeleteSecretRequest(name="secrets/db"))
    await refused(service.secrets.RevealSecrets(reveal), NotFound, "SECRET_NOT_FOUND")


@pytest.mark.parametrize(
    "fields",
    [
        {"items": []},
        {"items": [ipb.Secret.Item(key="A"), ipb.Secret.Item(key="A")]},
        {"items": [ipb.Secret.Item(key="not a name")]},
        {"items": [ipb.Secret.Item(key="A", value="x" * ((1 << 20) + 1))]},
        {"kind": ipb.Secret.MOUNT_FILE, "items": [ipb.Secret.Item(key="k", sub_path="../../etc/passwd")]},
        {"kind": ipb.Secret.MOUNT_FILE, "items": [ipb.Secret.Item(key="/etc/passwd")]},
    ],
)
async def test_a_secret_that_no_replica_could_take_is_refused(running: Registry, fields: dict[str, object]) -> None:
    request = ipb.CreateSecretRequest(secret=secret(**fields))
    await refused(running.admin.secrets.CreateSecret(request), InvalidArgument, "SECRET_INVALID")


async def test_a_lost_key_stops_the_start_and_a_new_key_rotates(tmp_path: Path) -> None:
    async with run_registry(tmp_path) as running:
        await running.admin.secrets.CreateSecret(ipb.CreateSecretRequest(secret=secret()))
        path = running.settings.secrets_key_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    old = path.read_text()
    path.unlink()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with run_registry(tmp_path):
            pass
    assert caught.group_contains(NotStarted, match="key file")
    path.write_text("new:" + "A" * 43 + "=\n" + old)
    async with run_registry(tmp_path) as running:
        service = running.stubs(SERVICE_TOKEN)
        reveal = ipb.RevealSecretsRequest(names=["secrets/db"])
        assert (await service.secrets.RevealSecrets(reveal)).secrets[0].items[0].value == "hunter2-hunter2"
        await running.admin.secrets.UpdateSecret(ipb.UpdateSecretRequest(secret=secret()))
    path.write_text("new:" + "A" * 43 + "=\n")
    async with run_registry(tmp_path) as running:
        service = running.stubs(SERVICE_TOKEN)
        assert (await service.secrets.RevealSecrets(reveal)).secrets[0].items[0].value == "hunter2-hunter2"


async def test_what_is_done_and_what_is_refused_is_written_down(running: Registry) -> None:
    viewer = await running.stubs_of_role("vera", VIEWER)
    await running.new_model(running.admin, "iris", "v1")
    name = "modelRepositories/iris/models/v1"
    await refused(viewer.models.DeleteModel(pb.DeleteModelRequest(name=name)), PermissionDenied, "ROLE_TOO_LOW")
    await refused(whoami(running.stubs("ekb_unknown")), Unauthenticated, "TOKEN_INVALID")
    await refused(viewer.audit.ListAuditEntries(ipb.ListAuditEntriesRequest()), PermissionDenied, "ROLE_TOO_LOW")
    everything = await running.admin.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(page_size=100))
    done = [(e.method, e.user, e.resource) for e in everything.audit_entries if e.outcome == "OK"]
    assert ("ekiben.registry.v1.Models/CreateModel", "users/admin", name) in done
    assert ("ekiben.identity.v1.Accounts/CreateUser", "users/admin", "users/vera") in done
    about = ipb.ListAuditEntriesRequest(refused=True, resource=name, user="users/vera")
    (entry,) = (await running.admin.audit.ListAuditEntries(about)).audit_entries
    assert (entry.outcome, entry.method) == ("PERMISSION_DENIED", "ekiben.registry.v1.Models/DeleteModel")
    unknown = ipb.ListAuditEntriesRequest(refused=True)
    outcomes = {e.outcome for e in (await running.admin.audit.ListAuditEntries(unknown)).audit_entries}
    assert outcomes == {"PERMISSION_DENIED", "UNAUTHENTICATED"}


async def test_the_audit_log_is_read_in_pages_newest_first(running: Registry) -> None:
    service = running.stubs(SERVICE_TOKEN)
    sent = [ipb.AuditEntry(method=f"m/{n}", outcome="OK", user="users/x", detail="\0" + "d" * 9000) for n in range(7)]
    await service.audit.RecordAuditEntries(ipb.RecordAuditEntriesRequest(audit_entries=sent))
    found: list[str] = []
    request = ipb.ListAuditEntriesRequest(user="users/x", page_size=3)
    while True:
        page = await running.admin.audit.ListAuditEntries(request)
        found += [entry.method for entry in page.audit_entries]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert found == [f"m/{n}" for n in range(6, -1, -1)]


async def test_refusals_of_strangers_are_forgotten_in_time_and_those_of_users_kept(tmp_path: Path) -> None:
    async with run_registry(tmp_path, collect_interval_s=0.02) as running:
        service = running.stubs(SERVICE_TOKEN)
        old = Timestamp()
        old.FromDatetime(datetime.now(UTC) - timedelta(days=31))
        sent = [
            ipb.AuditEntry(method=method, user=user, outcome="UNAUTHENTICATED", create_time=time)
            for method, user, time in (("old", "", old), ("new", "", None), ("known", "users/x", old))
        ]
        await service.audit.RecordAuditEntries(ipb.RecordAuditEntriesRequest(audit_entries=sent))

        async def only_those() -> bool:
            page = await running.admin.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(refused=True))
            return [entry.method for entry in page.audit_entries] == ["known", "new"]

        await until(only_those)


async def test_the_last_use_of_a_token_is_noted(tmp_path: Path) -> None:
    async with run_registry(tmp_path) as running:
        await whoami(running.admin)
    async with run_registry(tmp_path) as running:
        (token,) = (await running.admin.accounts.ListApiTokens(ipb.ListApiTokensRequest())).api_tokens
        assert datetime.now(UTC) - token.last_use_time.ToDatetime(UTC) < timedelta(minutes=1)
