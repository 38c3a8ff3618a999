"""The check of an installation: silent where all is well, and one name for each kind of damage."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition
from services.builder import store as builder
from services.content.digest import Digest
from services.content.sealing import new_key, write_keys
from services.deployer import store as deployer
from services.kernel.clock import ManualClock
from services.kernel.db import Database
from services.operations import backup, fsck
from services.operations.backup import back_up
from services.operations.findings import Severity
from services.operations.fsck import Report, check
from services.operations.installation import Installation
from services.operations.vaults import open_vault
from services.recorder.store import tables as recorder
from services.registry.aliases import Aliases
from services.registry.domain import BlobState, ContentState, Draft, Kind
from services.registry.first_start import ensure_admin
from services.registry.identities import SecretItem
from services.registry.store import tables as t
from tests.fixtures_operations import ME, Registry, installation_at, opened
from tests.postgres import PostgresServer
from tests.s3 import S3Server


@dataclass
class Place:
    """An installation with a little of everything, its services' databases open."""

    installation: Installation
    registry: Registry
    databases: dict[str, Database]
    digest: str
    """Of the content of `m:v1`."""
    version_id: int = 0

    async def run(self, service: str, *statements: Any) -> None:
        """Change rows behind the services' backs."""
        async with self.databases[service].transaction() as connection:
            for statement in statements:
                if isinstance(statement, str):
                    await connection.execute(sa.text(statement))
                else:
                    await connection.execute(statement)

    async def check(self, **options: Any) -> Report:
        return await check(self.installation, clock=self.registry.clock, **options)


DEPLOYMENT = {
    "uid": "d1",
    "organization": "organizations/default",
    "name": "demo",
    "labels": "{}",
    "cluster": "default",
    "scaling": "{}",
    "capture": "{}",
    "access_authorization": False,
    "dev": False,
    "generation": 1,
    "latest_revision": 1,
    "terminated": False,
    "deleting": False,
    "port": None,
    "build": "",
    "traceparent": "",
    "creator": "users/admin",
    "status": "{}",
}


async def fill(installation: Installation, folder: Path, clock: ManualClock) -> None:
    """A little of everything."""
    async with opened(installation, folder, clock) as registry, backup.open_databases(installation) as databases:
        token = folder / "admin-token"
        await ensure_admin(registry.database, clock, organization="default", admin="admin", admin_token_file=token)
        await registry.push("v1", b"one", labels={"team": "risk", "stage": "new"})
        await registry.push("v2", b"two")
        await registry.push("v3", b"three")
        await Aliases(registry.database, clock).set(ME, Kind.MODEL, "m", "production", "v2", reason="it is good")
        item = {"description": "", "kind": 1, "stage": 1, "path": "", "items": [SecretItem("KEY", "", "hidden")]}
        await registry.secrets.create(ME, "s", item)
        await registry.push("b1", b"bento", kind=Kind.BENTO, manifest=json.dumps({"models": ["m:v1"]}))
        bento = await registry.catalog.get_version(ME, Kind.BENTO, "m", "b1")
        bentos = {"main": {"name": bento.name, "digest": bento.content.digest, "manifest": "{}", "models": []}}
        revision = {"deployment_uid": "d1", "number": 1, "uid": "r1", "creator": "users/admin", "rolled_back_to": 0}
        texts = {"template": json.dumps({"secrets": ["secrets/s"]}), "bentos": json.dumps(bentos)}
        now = clock.now()
        async with databases["deployer"].transaction() as connection:
            values = {**DEPLOYMENT, "create_time": now, "update_time": now}
            await connection.execute(deployer.deployments.insert().values(**values))
            await connection.execute(deployer.revisions.insert().values(**revision, **texts, create_time=now))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation on SQLite and files, to be copied: migrating four databases for each case takes its time."""
    folder = tmp_path_factory.mktemp("template")
    asyncio.run(fill(installation_at("sqlite:", folder), folder, ManualClock()))
    return folder


@asynccontextmanager
async def looked_at(installation: Installation, folder: Path, clock: ManualClock) -> AsyncIterator[Place]:
    async with opened(installation, folder, clock) as registry, backup.open_databases(installation) as databases:
        v1 = await registry.catalog.get_version(ME, Kind.MODEL, "m", "v1")
        async with registry.database.read() as connection:
            found = await connection.execute(sa.select(t.versions.c.id).where(t.versions.c.version == "v1"))
            yield Place(installation, registry, databases, v1.content.digest, found.scalar_one())


@pytest.fixture
async def place(template: Path, tmp_path: Path, manual_clock: ManualClock) -> AsyncIterator[Place]:
    """On SQLite and files."""
    shutil.copytree(template, tmp_path / "home")
    installation = installation_at("sqlite:", tmp_path / "home")
    async with looked_at(installation, tmp_path / "home", manual_clock) as place:
        yield place


@pytest.fixture
async def cloud(
    postgres: PostgresServer, s3: S3Server, tmp_path: Path, manual_clock: ManualClock
) -> AsyncIterator[Place]:
    """On PostgreSQL and S3."""
    url = postgres.create(f"test_{os.urandom(6).hex()}")
    installation = installation_at(url, tmp_path / "cloud", s3.new_url())
    await fill(installation, tmp_path / "cloud", manual_clock)
    async with looked_at(installation, tmp_path / "cloud", manual_clock) as place:
        yield place


def told(report: Report) -> list[tuple[str, str]]:
    return [(finding.severity.value, finding.check) for finding in report.findings]


async def all_is_well(place: Place) -> None:
    report = await place.check(deep=True, repair=True)
    assert told(report) == []
    assert (sorted(report.services), report.blobs) == (["builder", "deployer", "recorder", "registry"], 4)


async def test_nothing_is_found_where_all_is_well(place: Place) -> None:
    await all_is_well(place)


Sabotage = Callable[[Place], Awaitable[None]]
CASES: dict[str, tuple[Sabotage, str, str, bool]] = {}
"""By name: what is done, the check and the resource that tell of it, and whether a repair mends it."""


def case(check: str, resource: str = "", *, mends: bool = False) -> Callable[[Sabotage], Sabotage]:
    def register(sabotage: Sabotage) -> Sabotage:
        CASES[sabotage.__name__] = sabotage, check, resource, mends
        return sabotage

    return register


V1 = "modelRepositories/m/models/v1"


@case("BLOB_MISSING", V1)
async def a_blob_is_deleted(place: Place) -> None:
    await place.registry.blobs.delete(Digest.parse(place.digest))


@case("BLOB_NOT_HELD", V1, mends=True)
async def the_row_of_a_blob_is_deleted(place: Place) -> None:
    await place.run("registry", t.blobs.delete().where(t.blobs.c.digest == place.digest))


@case("BLOB_NOT_HELD", V1, mends=True)
async def the_row_of_a_blob_says_it_is_on_its_way(place: Place) -> None:
    claimed = t.blobs.update().where(t.blobs.c.digest == place.digest).values(state=BlobState.CLAIMED)
    await place.run("registry", claimed)


@case("LISTING_MISSING", V1, mends=True)
async def nobody_lists_the_files_of_a_blob(place: Place) -> None:
    await place.run("registry", t.blob_listings.delete().where(t.blob_listings.c.digest == place.digest))


@case("LISTING_INCOMPLETE", V1, mends=True)
async def a_list_of_files_has_lost_one(place: Place) -> None:
    this = t.blob_listings.c.digest == place.digest
    await place.run("registry", t.blob_listings.update().where(this).values(state="DONE", file_count=7))


@case("UPLOAD_GONE", V1, mends=True)
async def an_upload_is_gone(place: Place) -> None:
    await place.run(
        "registry",
        t.versions.update()
        .where(t.versions.c.id == place.version_id)
        .values(state=ContentState.UPLOADING, digest=None),
    )


@case("QUOTA_MISCOUNTED", "organizations/default/quota", mends=True)
async def a_count_is_wrong(place: Place) -> None:
    await place.run("registry", t.quotas.update().values(bytes=t.quotas.c.bytes + 1))


@case("LABELS_DIFFER", V1, mends=True)
async def an_indexed_label_is_deleted(place: Place) -> None:
    await place.run("registry", t.labels.delete().where(t.labels.c.key == "team"))


@case("LABELS_DIFFER", V1, mends=True)
async def an_indexed_label_has_another_value(place: Place) -> None:
    await place.run("registry", t.labels.update().where(t.labels.c.key == "team").values(value="other"))


@case("LABELS_DIFFER", V1, mends=True)
async def an_indexed_label_has_a_wrong_term(place: Place) -> None:
    await place.run("registry", t.labels.update().where(t.labels.c.key == "team").values(value_term=b"x" * 16))


@case("LABELS_ORPHANED", "version row 9999", mends=True)
async def a_label_of_nothing(place: Place) -> None:
    await place.run("registry", t.labels.update().where(t.labels.c.key == "team").values(owner_id=9999))


@case("VERSION_MISPLACED", "modelRepositories/elsewhere/models/v1")
async def a_version_says_another_repository(place: Place) -> None:
    moved = t.versions.update().where(t.versions.c.id == place.version_id).values(repository="elsewhere")
    await place.run("registry", moved)


@case("ALIAS_MISPLACED", "modelRepositories/other alias production")
async def an_alias_names_another_repositorys_version(place: Place) -> None:
    await place.run(
        "registry", t.aliases.update().values(repository="other"), t.alias_changes.update().values(repository="other")
    )


@case("ALIAS_HISTORY_DIFFERS", "modelRepositories/m alias production")
async def an_alias_moved_without_its_history(place: Place) -> None:
    await place.run("registry", t.aliases.update().values(version_id=place.version_id))


@case("SECRET_KEY_MISSING", "secrets/s")
async def the_key_is_lost(place: Place) -> None:
    assert place.installation.key_file is not None
    write_keys(place.installation.key_file, [new_key()])


@case("NO_ADMIN", "organizations/default")
async def no_admin_is_left(place: Place) -> None:
    await place.run("registry", t.users.update().values(role=int(Role.ROLE_VIEWER)))


@case("MODEL_MISSING", "bentoRepositories/m/bentos/b1")
async def a_model_of_a_bento_is_not_there(place: Place) -> None:
    await place.run("registry", t.versions.update().values(models='["modelRepositories/m/models/gone"]'))


@case("DEPLOYED_VERSION_MISSING", "deployments/demo")
async def a_deployed_bento_is_gone(place: Place) -> None:
    bento = t.versions.c.kind == "bento"
    await place.run("registry", t.uploads.delete(), t.versions.delete().where(bento))


@case("DEPLOYED_VERSION_CHANGED", "deployments/demo")
async def a_deployed_bento_was_pushed_again(place: Place) -> None:
    bento = t.versions.c.kind == "bento"
    await place.run("registry", t.versions.update().where(bento).values(digest=place.digest, size_bytes=10240))


@case("DEPLOYED_SECRET_MISSING", "deployments/demo")
async def a_deployed_secret_is_gone(place: Place) -> None:
    await place.run("registry", t.secrets.delete())


@case("REVISION_MISSING", "deployments/demo")
async def a_revision_is_gone(place: Place) -> None:
    await place.run("deployer", deployer.deployments.update().values(latest_revision=7))


@case("BUILD_STATE_WRONG", "builds/b1")
async def a_build_succeeded_without_a_result(place: Place) -> None:
    texts = ("uid", "organization", "bento", "bento_digest", "dedup_key", "creator", "traceparent", "step")
    row: dict[str, Any] = dict.fromkeys(texts, "x")
    row |= {"secrets": "[]", "force": False, "progress_percent": 0, "cached": False, "attempts": 1, "version": 1}
    created = {"create_time": place.registry.clock.now()}
    await place.run("builder", builder.builds.insert().values(id="b1", state="SUCCEEDED", **row, **created))


@case("TRACES_EMPTY", "traces")
async def a_trace_without_spans(place: Place) -> None:
    numbers = ("start_ns", "end_ns", "span_count", "error_count", "root_start_ns", "updated_us")
    row: dict[str, Any] = dict.fromkeys(numbers, 1) | dict.fromkeys(("root_span_id", "root_parent_span_id", "root"), "")
    trace = {"organization": "default", "trace_id": "1" * 32, "failed": False}
    await place.run("recorder", recorder.traces.insert().values(**row, **trace))


@case("SCHEMA_DIFFERS")
async def somebody_dropped_a_column(place: Place) -> None:
    await place.run("recorder", "ALTER TABLE log_usage ADD COLUMN mine INTEGER")


@case("REVISION_DIFFERS")
async def the_tables_are_of_another_release(place: Place) -> None:
    await place.run("builder", "UPDATE alembic_version_builder SET version_num = '0000'")


@pytest.mark.parametrize("name", CASES)
async def test_each_damage_has_a_name(place: Place, name: str) -> None:
    sabotage, check_name, resource, mends = CASES[name]
    await sabotage(place)
    report = await place.check()
    found = [finding for finding in report.findings if finding.check == check_name]
    assert [finding.resource for finding in found] == [resource], told(report)
    assert found[0].what and found[0].then
    others = {finding.check for finding in report.findings if finding.failed} - {check_name}
    # Orphaned labels are missing from their owner, and rows that were changed by hand are not counted.
    assert not others - {"LABELS_DIFFER", "QUOTA_MISCOUNTED"}, others
    repaired = await place.check(repair=True)
    again = await place.check()
    if mends:
        assert [finding.repaired for finding in repaired.findings if finding.check == check_name] == [True]
        assert [finding for finding in again.findings if finding.failed] == []
    else:
        assert [finding.check for finding in again.findings if finding.check == check_name] == [check_name]


TOGETHER = (
    a_blob_is_deleted,
    an_indexed_label_has_a_wrong_term,
    an_alias_moved_without_its_history,
    the_key_is_lost,
    no_admin_is_left,
    a_deployed_bento_is_gone,
    a_revision_is_gone,
    a_build_succeeded_without_a_result,
    a_trace_without_spans,
    somebody_dropped_a_column,
)


async def test_damage_is_found_and_repaired_on_postgresql_and_s3_while_the_registry_runs(
    cloud: Place, tmp_path: Path
) -> None:
    await all_is_well(cloud)
    async with open_vault(str(tmp_path / "vault"), may_make=True) as vault:
        await back_up(cloud.installation, vault, clock=cloud.registry.clock)
        await a_blob_is_deleted(cloud)
        report = await cloud.check(repair=True, source=vault)
        assert [(finding.check, finding.repaired) for finding in report.findings] == [("BLOB_MISSING", True)]
    await all_is_well(cloud)
    assert (await cloud.registry.check())["v1"] == "READY"
    for sabotage in TOGETHER:
        await sabotage(cloud)
    wanted = {CASES[sabotage.__name__][1] for sabotage in TOGETHER} - {"DEPLOYED_VERSION_MISSING"}
    report = await cloud.check(repair=True)
    found = {finding.check for finding in report.findings if finding.severity is not Severity.NOTE}
    assert found == wanted | {"QUOTA_MISCOUNTED"}
    left = {finding.check for finding in (await cloud.check()).findings if finding.severity is not Severity.NOTE}
    assert left == wanted - {"LABELS_DIFFER"}


async def test_damaged_bytes_are_found_and_come_back_out_of_a_backup(place: Place, tmp_path: Path) -> None:
    path = place.registry.blobs.path(Digest.parse(place.digest))
    assert path is not None
    async with open_vault(str(tmp_path / "vault"), may_make=True) as vault:
        await back_up(place.installation, vault, clock=place.registry.clock)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert told(await place.check()) == []
        (finding,) = (await place.check(deep=True)).findings
        assert (finding.check, finding.resource) == ("BLOB_DAMAGED", V1)
        path.write_bytes(b"short")
        (finding,) = (await place.check()).findings
        assert (finding.check, "has 5 bytes where" in finding.what) == ("BLOB_DAMAGED", True)
        with pytest.raises(FailedPrecondition, match="in use by another process"):
            await place.check(repair=True, source=vault)
    installation, clock = place.installation, place.registry.clock
    async with open_vault(str(tmp_path / "vault")) as vault:
        home = tmp_path / "copy"
        shutil.copytree(tmp_path / "home", home)  # which nobody has open
        stopped = installation_at("sqlite:", home)
        report = await check(stopped, repair=True, source=vault, clock=clock)
        assert [(finding.check, finding.repaired) for finding in report.findings] == [("BLOB_DAMAGED", True)]
        assert told(await check(stopped, deep=True, clock=clock)) == []
    assert installation.blobs != stopped.blobs


async def test_what_is_deleted_while_it_is_looked_at_is_no_finding(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fsck._Bytes.check

    async def late(self: Any, *args: Any, **kwargs: Any) -> None:
        await place.registry.delete("v3")
        await place.registry.push("v9", b"nine")
        await place.registry.collect()
        await real(self, *args, **kwargs)

    monkeypatch.setattr(fsck._Bytes, "check", late)
    report = await place.check(deep=True)
    assert [finding for finding in report.findings if finding.severity is not Severity.NOTE] == []


async def test_what_goes_away_by_itself_is_a_note(place: Place) -> None:
    registry = place.registry
    await registry.catalog.create_version(ME, Kind.MODEL, "m", "v4", Draft())
    await registry.uploads.create(ME, "modelRepositories/m/models/v4", "", None)
    await registry.delete("v3")
    registry.clock.jump(timedelta(hours=2))
    report = await place.check()
    assert {(finding.severity.value, finding.check) for finding in report.findings} >= {
        ("NOTE", "GARBAGE"),
        ("NOTE", "UPLOAD_LATE"),
    }
    assert not any(finding.failed for finding in report.findings)
    await registry.collect()
    assert told(await place.check()) == []
