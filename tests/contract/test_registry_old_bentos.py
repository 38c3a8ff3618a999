"""Bentos that were pushed before the registry knew of uses keep their models too."""

import json
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition
from services.kernel.clock import SYSTEM
from services.kernel.db import _folder, open_database
from services.kernel.identity import Principal
from services.kernel.migrations import _config, version_table
from services.registry.app import MIGRATIONS
from services.registry.catalog import Catalog
from services.registry.domain import Kind
from services.registry.lineage import MAX_USES, Lineage

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
BEFORE = "0006"
MANY = 5001
"""More than one batch of the migration."""


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection")
async def test_what_old_bentos_use_is_read_from_their_rows(database_url: str) -> None:
    async with open_database(database_url) as database:

        def upgrade(connection: sa.Connection) -> None:
            command.upgrade(_config(connection, _folder(MIGRATIONS), version_table(MIGRATIONS)), BEFORE)

        async with database.transaction() as connection:
            await connection.run_sync(upgrade)
        old = sa.MetaData()
        async with database.read() as connection:
            await connection.run_sync(lambda bound: old.reflect(bound, only=["repositories", "versions"]))
        common: dict[str, Any] = {"organization": "default", "description": "", "labels": "{}", "creator": "users/a"}
        common |= {"updater": "users/a", "create_time": 1_000_000, "update_time": 1_000_000, "revision": 1}
        rest: dict[str, Any] = {"manifest": "", "module": "", "bentoml_version": "", "development": False}
        rest |= {"state": "PENDING", "size_bytes": 0, "failure": ""}

        def version(kind: str, repository_id: int, name: str, models: list[str]) -> dict[str, Any]:
            named = {"kind": kind, "repository": kind, "repository_id": repository_id, "version": name}
            return {**common, **rest, **named, "uid": f"{kind}-{name}", "models": json.dumps(models)}

        async with database.transaction() as connection:
            for row_id, kind in ((1, "model"), (2, "bento")):
                repository = {**common, "id": row_id, "kind": kind, "repository": kind, "uid": kind}
                await connection.execute(old.tables["repositories"].insert(), repository)
            model = "modelRepositories/model/models/v1"
            rows = [version("model", 1, "v1", []), version("bento", 2, "none", [])]
            rows += [version("bento", 2, f"b{number}", [model, model]) for number in range(MANY)]
            await connection.execute(old.tables["versions"].insert(), rows)

        await database.migrate(MIGRATIONS)
        catalog, lineage = Catalog(database, SYSTEM), Lineage(database, SYSTEM)
        with pytest.raises(FailedPrecondition) as caught:
            await catalog.delete_version(ME, Kind.MODEL, "model", "v1", "")
        assert f"and {MANY - 5:d} more" in caught.value.message
        graph = await lineage.graph(ME, "bentoRepositories/bento/bentos/b7", live_only=True)
        assert [(use.resource, use.create_time.timestamp()) for use in graph.uses if use.create_time] == [(model, 1.0)]
        many = await lineage.graph(ME, model, live_only=True)
        assert many.truncated
        assert len(many.uses) == MAX_USES
        await catalog.delete_repository(ME, Kind.BENTO, "bento", "", force=True)
        await catalog.delete_version(ME, Kind.MODEL, "model", "v1", "")
