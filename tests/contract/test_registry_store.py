"""The registry's store on SQLite and on PostgreSQL alike."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated
from services.content.sealing import Keys
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.identity import AuditRecord, Principal
from services.registry.accounts import Accounts, TokenDraft
from services.registry.app import MIGRATIONS
from services.registry.audit import Audit, AuditFilter
from services.registry.catalog import Catalog
from services.registry.deletions import Deletions
from services.registry.domain import ContentState, Draft, Kind
from services.registry.first_start import ensure_admin
from services.registry.identities import SecretItem
from services.registry.logins import Logins
from services.registry.search import Subject, parse
from services.registry.secrets import Secrets
from services.registry.store import blobs as held
from services.registry.store import metadata
from services.registry.store.tables import versions

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
BOB = Principal("users/bob", "organizations/default", Role.ROLE_DEVELOPER)
OTHER = Principal("users/admin", "organizations/other", Role.ROLE_ADMIN)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as database:
        await database.migrate(MIGRATIONS)
        yield database


@pytest.fixture
def catalog(database: Database, manual_clock: ManualClock) -> Catalog:
    return Catalog(database, manual_clock)


async def test_migrations_make_the_tables_that_the_store_uses(database: Database) -> None:
    assert await database.schema_differences(MIGRATIONS, metadata) == []


async def fill(catalog: Catalog, clock: ManualClock) -> None:
    manifest = '{"module": "bentoml.%s", "dev": %s}'
    for place, (version, labels, caller) in enumerate(
        [
            ("a", {"team": "risk", "stage": "new"}, ME),
            ("b", {"team": "audit"}, BOB),
            ("c", {"team": "ops", "owner": "Smith, J."}, ME),
            ("d", {}, BOB),
        ]
    ):
        text = manifest % ("sklearn" if place % 2 else "torch", "true" if place == 3 else "false")
        draft = Draft(
            description=f"Number {place}: 100% of_it",
            labels=labels,
            manifest=text,
            build_time=datetime(2020, 1, 10 - place, tzinfo=UTC),
        )
        await catalog.create_version(caller, Kind.MODEL, "iris", version, draft)
        await catalog.create_version(caller, Kind.BENTO, "svc", version, draft)
        await clock.advance(1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "dcba"),
        ("iris", "dcba"),
        ("IRIS number", "dcba"),
        ("in:name number", ""),
        ("in:description iris", ""),
        ("100%", "dcba"),
        ("1%0", ""),
        ("of_it", "dcba"),
        ("ofXit", ""),
        ('"number 2"', "c"),
        ("label:team", "cba"),
        ("label:team=risk", "a"),
        ("label:team=risk,team=audit", "ba"),
        ("label:team=risk label:stage=new", "a"),
        ("label:team=audit label:stage", ""),
        ("-label:team=risk", "dcb"),
        ("-label:team", "d"),
        ("-label:team=risk,team=audit label:team", "c"),
        ('label:"owner=Smith, J."', "c"),
        ("creator:@me", "ca"),
        ("creator:bob", "db"),
        ("creator:bob creator:@me", "dcba"),
        ("creator:nobody", ""),
        ("last_updater:bob", "db"),
        ("module:bentoml.torch", "ca"),
        ("is:pending", "dcba"),
        ("not:pending", ""),
        ("is:ready", ""),
        ("sort:created_at-asc", "abcd"),
        ("sort:build_at-asc", "dcba"),
        ("sort:build_at-desc team=", ""),
    ],
)
async def test_models_are_searched(catalog: Catalog, manual_clock: ManualClock, text: str, wanted: str) -> None:
    await fill(catalog, manual_clock)
    found = await catalog.list_versions(ME, Kind.MODEL, None, text, 10, None)
    assert "".join(version.version for version in found.items) == wanted
    assert found.total == len(wanted)


async def test_bentos_under_development_and_repositories_are_searched(
    catalog: Catalog, manual_clock: ManualClock
) -> None:
    await fill(catalog, manual_clock)
    found = await catalog.list_versions(ME, Kind.BENTO, "svc", "is:dev", 10, None)
    assert [version.version for version in found.items] == ["d"]
    await catalog.create_repository(BOB, Kind.MODEL, "zeta", Draft(labels={"a": "b"}, description="x"))
    for text, wanted in (("label:a=b", ["zeta"]), ("-label:a", ["iris"]), ("sort:updated_at-asc", ["iris", "zeta"])):
        repositories = await catalog.list_repositories(ME, Kind.MODEL, text, 10, None)
        assert [repository.repository for repository in repositories.items] == wanted
    assert (await catalog.list_repositories(OTHER, Kind.MODEL, "", 10, None)).total == 0


async def test_pages_are_stable_while_versions_come_and_go(catalog: Catalog, manual_clock: ManualClock) -> None:
    for number in range(10):
        await catalog.create_version(ME, Kind.MODEL, "m", f"v{number}", Draft())
    first = await catalog.list_versions(ME, Kind.MODEL, "m", "", 4, None)
    assert [v.version for v in first.items] == ["v9", "v8", "v7", "v6"]
    await catalog.create_version(ME, Kind.MODEL, "m", "new", Draft())
    await catalog.delete_version(ME, Kind.MODEL, "m", "v6", "")
    second = await catalog.list_versions(ME, Kind.MODEL, "m", "", 4, first.next)
    assert [v.version for v in second.items] == ["v5", "v4", "v3", "v2"]
    third = await catalog.list_versions(ME, Kind.MODEL, "m", "", 4, second.next)
    assert ([v.version for v in third.items], third.next) == (["v1", "v0"], None)


async def test_one_of_many_creates_wins(catalog: Catalog) -> None:
    results = await asyncio.gather(
        *(catalog.create_version(ME, Kind.MODEL, "new", "v1", Draft()) for _ in range(8)), return_exceptions=True
    )
    assert sum(isinstance(result, AlreadyExists) for result in results) == 7
    repository = await catalog.get_repository(ME, Kind.MODEL, "new")
    assert repository.version_count == 1


async def test_concurrent_updates_are_all_counted(catalog: Catalog) -> None:
    created = await catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
    await asyncio.gather(
        *(catalog.update_version(ME, Kind.MODEL, "m", "v1", Draft(labels={f"k{n}": "v"}), "") for n in range(8))
    )
    updated = await catalog.get_version(ME, Kind.MODEL, "m", "v1")
    assert updated.revision == created.revision + 8
    key = next(iter(updated.labels))
    assert (await catalog.list_versions(ME, Kind.MODEL, "m", f"label:{key}", 10, None)).total == 1
    others = " ".join(f"-label:k{n}" for n in range(8) if f"k{n}" != key)
    assert (await catalog.list_versions(ME, Kind.MODEL, "m", others, 10, None)).total == 1


async def test_long_unicode_labels_are_kept_and_found(catalog: Catalog) -> None:
    labels = {"ключ" * 32: "値" * 1024}
    await catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft(labels=labels))
    assert (await catalog.get_version(ME, Kind.MODEL, "m", "v1")).labels == labels
    found = await catalog.list_versions(ME, Kind.MODEL, "m", "label:" + "ключ" * 32, 10, None)
    assert found.total == 1


async def test_annotations_are_kept_whole_and_are_not_searched(
    database: Database, catalog: Catalog, manual_clock: ManualClock
) -> None:
    report = {"report": "値\n" * 40_000, "links/ci": "https://ci.example/1"}
    created = await catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft(annotations=report, labels={"a": "b"}))
    assert created.annotations == report
    assert (await catalog.list_versions(ME, Kind.MODEL, "m", "label:report", 10, None)).items == []
    updated = await catalog.update_version(ME, Kind.MODEL, "m", "v1", Draft(annotations={"x": ""}), "")
    assert (updated.annotations, updated.labels, updated.revision) == ({"x": ""}, {"a": "b"}, created.revision + 1)
    await catalog.update_version(ME, Kind.MODEL, "m", "v1", Draft(labels={}), "")
    assert (await catalog.get_version(ME, Kind.MODEL, "m", "v1")).annotations == {"x": ""}
    await catalog.update_repository(ME, Kind.MODEL, "m", Draft(annotations={"owner": "team"}), "")
    with pytest.raises(InvalidArgument) as refused:
        await catalog.update_repository(ME, Kind.MODEL, "m", Draft(annotations={"k": "x" * (256 << 10)}), "")
    assert refused.value.reason == "ANNOTATIONS_INVALID"
    (repository,) = (await catalog.list_repositories(ME, Kind.MODEL, "", 10, None)).items
    assert repository.annotations == {"owner": "team"}
    # Deleted and restored, all is there again.
    kept = Catalog(database, manual_clock, delete_grace=timedelta(days=1))
    await kept.delete_repository(ME, Kind.MODEL, "m", "", force=True)
    await Deletions(database, manual_clock).undelete(ME, created.uid)
    assert (await catalog.get_version(ME, Kind.MODEL, "m", "v1")).annotations == {"x": ""}
    assert (await catalog.get_repository(ME, Kind.MODEL, "m")).annotations == {"owner": "team"}


async def test_a_claim_and_a_condemnation_exclude_one_another(database: Database, manual_clock: ManualClock) -> None:
    digest = "sha256:" + "a" * 64
    now = manual_clock.now()
    later = now + timedelta(minutes=1)

    async def claim() -> bool:
        async with database.transaction() as connection:
            return await held.claim(connection, digest, later)

    async def condemn(at: datetime) -> bool:
        async with database.transaction() as connection:
            return await held.condemn(connection, digest, at)

    assert await claim()
    assert not await condemn(now)
    for _ in range(10):
        async with database.transaction() as connection:
            await held.adopt(connection, digest, now)
            await connection.execute(held.blobs.update().values(claim_end_time=now, state="STORED"))
        claimed, condemned = await asyncio.gather(claim(), condemn(now))
        assert claimed != condemned
        async with database.transaction() as connection:
            assert await held.store(connection, digest, later) == claimed
            await held.delete(connection, digest)


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(hours=1)])
async def test_a_condemnation_waits_for_a_naming_and_sees_it(
    database: Database, catalog: Catalog, manual_clock: ManualClock, ahead: timedelta
) -> None:
    """The collector decides by a snapshot from before the naming, perhaps with a clock that is ahead of the other's."""
    digest = "sha256:" + "b" * 64
    now = manual_clock.now()
    await catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
    async with database.transaction() as connection:
        await held.adopt(connection, digest, now)
    naming = asyncio.Event()

    async def condemn() -> bool:
        await naming.wait()
        async with database.transaction() as connection:
            return await held.condemn(connection, digest, now + ahead)

    waiting = asyncio.ensure_future(condemn())
    async with database.transaction() as connection:
        assert await held.store(connection, digest, now + timedelta(microseconds=1))
        await connection.execute(versions.update().values(digest=digest, state=ContentState.READY))
        naming.set()
        await asyncio.sleep(0.2)  # long enough for the other to reach the row's lock
    assert not await waiting


async def test_nothing_is_condemned_under_a_hold(database: Database, manual_clock: ManualClock) -> None:
    digest = "sha256:" + "c" * 64
    now = manual_clock.now()

    async def condemn(at: datetime) -> bool:
        async with database.transaction() as connection:
            return await held.condemn(connection, digest, at)

    async with database.transaction() as connection:
        await held.adopt(connection, digest, now)
        await held.hold(connection, "one", "a backup", now, now + timedelta(seconds=5))
        await held.hold(connection, "two", "a backup", now, now + timedelta(seconds=5))
        await held.hold(connection, "two", "a backup", now, now + timedelta(seconds=9))
    assert not await condemn(now + timedelta(seconds=8))
    async with database.transaction() as connection:
        await held.release(connection, "two")
    assert not await condemn(now + timedelta(seconds=4))
    assert await condemn(now + timedelta(seconds=6))


async def test_the_first_start_and_the_last_admin(database: Database, manual_clock: ManualClock, tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "admin-token"
    # One after the other, as starts are: the lock of the blobs' folder is taken before.
    for _ in range(2):
        await ensure_admin(database, manual_clock, organization="default", admin="admin", admin_token_file=file)
    accounts = Accounts(database, manual_clock)
    caller = await accounts.authenticate(file.read_text().strip())
    second = {"email": "", "first_name": "", "last_name": "", "role": int(Role.ROLE_ADMIN), "disabled": False}
    await accounts.create_user(caller, "ada", second)
    results = await asyncio.gather(
        accounts.delete_user(caller, "ada", ""), accounts.delete_user(caller, "admin", ""), return_exceptions=True
    )
    assert sorted(type(result) for result in results if result is not None) == [FailedPrecondition]


async def test_a_login_is_redeemed_once(database: Database, manual_clock: ManualClock, tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "admin-token"
    await ensure_admin(database, manual_clock, organization="default", admin="admin", admin_token_file=file)
    logins, accounts = Logins(database, manual_clock), Accounts(database, manual_clock)
    code, _ = await logins.create(ME)
    await logins.approve(ME, code)
    results = await asyncio.gather(*(logins.redeem(code) for _ in range(5)), return_exceptions=True)
    (token,) = [result for result in results if isinstance(result, str)]
    assert (await accounts.authenticate(token)).user == "users/admin"
    await accounts.write_uses()
    _, total = await accounts.list_tokens(ME, "browser", 10, None)
    assert total == 1
    await accounts.create_token(ME, TokenDraft("x"))


async def test_registries_that_start_at_once_make_one_admin_token(
    database: Database, manual_clock: ManualClock, tmp_path: Path
) -> None:
    file = tmp_path / "admin-token"
    starts = [
        ensure_admin(database, manual_clock, organization="default", admin="admin", admin_token_file=path)
        for path in (file, None, file, None)
    ]
    await asyncio.gather(*starts)
    accounts = Accounts(database, manual_clock)
    assert (await accounts.authenticate(file.read_text().strip())).user == "users/admin"
    _, total = await accounts.list_tokens(ME, "", 10, None)
    assert total == 1


async def test_a_token_that_an_operator_puts_into_the_admin_tokens_file_is_an_admins(
    database: Database, manual_clock: ManualClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def start(*values: str) -> None:
        """As registries with these in their files do, at once."""
        files = [tmp_path / f"{at} {name[:20]}" / "admin-token" for at, name in enumerate(values)]
        for file, value in zip(files, values, strict=True):
            file.parent.mkdir(exist_ok=True)
            file.write_text(value)
        starting = (
            ensure_admin(database, manual_clock, organization="default", admin="admin", admin_token_file=file)
            for file in files
        )
        await asyncio.gather(*starting)
        assert [file.read_text() for file in files] == [*values]

    first, other, deleted = (f"ekb_{letter * 43}" for letter in "abc")
    accounts, audit = Accounts(database, manual_clock), Audit(database)
    await start(first)
    assert await audit.list(ME, AuditFilter(), 10, None) == []
    await start(other, other)  # Files of one Secret, which was made anew.
    for token in (first, other):  # Of another machine, for all that is known.
        caller = await accounts.authenticate(token)
        assert (caller.user, caller.role) == ("users/admin", Role.ROLE_ADMIN)
    [(_, entry)] = await audit.list(ME, AuditFilter(user="services/registry"), 10, None)
    assert entry.resource == caller.api_token and entry.method.endswith("/CreateApiToken")

    # What somebody ended comes back by no file.
    await start(deleted)
    await accounts.delete_token(caller, (await accounts.authenticate(deleted)).api_token.removeprefix("apiTokens/"))
    names = {"email": "", "first_name": "", "last_name": ""}
    await accounts.create_user(caller, "ada", {"role": int(Role.ROLE_ADMIN), "disabled": False, **names})
    _, leaver = await accounts.create_token(caller, TokenDraft("x", user="ada"))
    await accounts.delete_user(caller, "ada", "")
    ending = TokenDraft("x", expire_time=manual_clock.now() + timedelta(hours=1))
    _, expired = await accounts.create_token(caller, ending)
    manual_clock.jump(timedelta(hours=2))
    _, before = await accounts.list_tokens(ME, "", 10, None)
    caplog.clear()
    for token, why in ((deleted, "was deleted"), (leaver, "was deleted"), (expired, "has expired"), ("x", "is none")):
        await start(token)
        assert why in caplog.records[-1].__dict__["why"]
        with pytest.raises(Unauthenticated):
            await accounts.authenticate(token)
    assert (await accounts.list_tokens(ME, "", 10, None))[1] == before


async def test_secrets_and_audit(database: Database, manual_clock: ManualClock) -> None:
    secrets = Secrets(database, Keys({"k": b"k" * 32}), manual_clock)
    values = {"description": "", "kind": 1, "stage": 1, "path": "", "items": [SecretItem("A", "", "é\n\0"[:2])]}
    await secrets.create(ME, "s", values)
    assert (await secrets.reveal(ME, ["s"]))[0].items[0].value == "é\n"
    audit = Audit(database)
    await audit.record(AuditRecord(manual_clock.now(), "users/x", "organizations/default", "m", "OK"))
    assert len(await audit.list(ME, AuditFilter(user="users/x"), 10, None)) == 1
    assert await audit.list(ME, AuditFilter(refused=True), 10, None) == []


def test_the_search_is_parsed_for_whoever_asks() -> None:
    assert parse("creator:@me", Subject.MODELS, caller="users/x").creators == ("users/x",)
