"""What later revisions make of the rows of earlier ones."""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from services.kernel import migrations
from services.kernel.clock import ManualClock
from services.kernel.db import Database, _folder, open_database
from services.registry.app import MIGRATIONS
from services.registry.catalog import Catalog
from services.registry.domain import Draft, Kind
from services.registry.store import metadata
from services.registry.store.tables import labels
from tests.contract.test_registry_store import ME
from tests.postgres import PostgresServer


async def upgrade(database: Database, revision: str) -> None:
    """Bring the database to an older revision."""

    def run(connection: sa.Connection) -> None:
        from alembic import command

        config = migrations._config(connection, _folder(MIGRATIONS), migrations.version_table(MIGRATIONS))
        command.upgrade(config, revision)

    async with database.transaction() as connection:
        await connection.run_sync(run)


OLD_REPOSITORY = (
    "INSERT INTO repositories (id, organization, kind, repository, uid, description, labels, creator, updater, "
    "create_time, update_time, revision) "
    "VALUES (1, 'default', 'model', 'm', 'u', 'd', '{\"r\": \"1\"}', 'users/a', 'users/a', 5, 6, 1)"
)
OLD_VERSION = (
    "INSERT INTO versions (id, repository_id, organization, kind, repository, version, uid, description, labels, "
    "creator, updater, create_time, update_time, revision, manifest, module, bentoml_version, development, models, "
    "state, size_bytes, failure) VALUES (1, 1, 'default', 'model', 'm', 'v1', 'u', 'd', '{}', 'users/a', 'users/a', "
    "7, 8, 1, '', '', '', false, '[]', 'PENDING', 0, '')"
)


async def test_labels_from_before_the_indexes_are_found(database_url: str, manual_clock: ManualClock) -> None:
    async with open_database(database_url) as database:
        await upgrade(database, "0001")
        async with database.transaction() as connection:
            await connection.execute(sa.text(OLD_REPOSITORY.replace(":", "\\:")))
            await connection.execute(sa.text(OLD_VERSION))
            for owner, key, value in (("repository", "r", "1"), ("version", "team", "risk"), ("version", "k", "é")):
                await connection.execute(
                    sa.text("INSERT INTO labels VALUES (:owner, 1, :key, :value)"),
                    {"owner": owner, "key": key, "value": value},
                )
        await database.migrate(MIGRATIONS)
        assert await database.schema_differences(MIGRATIONS, metadata) == []
        catalog = Catalog(database, manual_clock)
        for text in ("label:team=risk label:k=é", "label:team", "label:k=é,team=x sort:size-asc"):
            assert (await catalog.list_versions(ME, Kind.MODEL, None, text, 10, None)).total == 1, text
        assert (await catalog.list_repositories(ME, Kind.MODEL, "label:r=1", 10, None)).total == 1
        await catalog.update_version(ME, Kind.MODEL, "m", "v1", Draft(labels={"team": "risk", "k": "é"}), "")
        async with database.read() as connection:
            rows = (await connection.execute(sa.select(labels).where(labels.c.owner == "version"))).all()
        assert {row.create_time for row in rows} == {_moment(7)}


def _moment(microseconds: int) -> datetime:
    """As UtcDateTime reads it."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)


async def test_words_are_found_where_the_extension_is_forbidden(
    postgres: PostgresServer, manual_clock: ManualClock
) -> None:
    postgres.create("bare")
    postgres.psql("CREATE ROLE poor LOGIN")
    postgres.psql("GRANT ALL ON SCHEMA public TO poor", "bare")
    async with open_database(postgres.url("bare", "poor")) as database:
        await database.migrate(MIGRATIONS)
        assert await database.schema_differences(MIGRATIONS, metadata) == []
        catalog = Catalog(database, manual_clock)
        await catalog.create_version(ME, Kind.MODEL, "iris", "v1", Draft(description="Ünder A"))
        for text in ("ris", '"iris:v1"', "under", "nder", "a"):
            found = await catalog.list_versions(ME, Kind.MODEL, None, text, 10, None)
            assert found.total == (text != "under"), text
