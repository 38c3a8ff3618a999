"""Alembic for a service: where its migrations live, and how they are run.

A service keeps a package of this form:

    services/registry/migrations/__init__.py      a docstring
    services/registry/migrations/env.py           the three lines below
    services/registry/migrations/versions/0001_first_tables.py, 0002_…

    # env.py
    from services.kernel.migrations import run
    from services.registry.store import metadata
    run(metadata)

    # versions/0001_first_tables.py
    import sqlalchemy as sa
    from alembic import op
    from services.kernel.db import UtcDateTime

    revision = "0001"
    down_revision = None

    def upgrade() -> None:
        op.create_table(
            "models",
            sa.Column("name", sa.String, primary_key=True),
            sa.Column("create_time", UtcDateTime, nullable=False),
        )

`revision` and `down_revision` are string literals (None for the first), one line each: they are read without
importing the file. `downgrade` may be left out: a release refuses the database of a newer one, and a copy from before
the upgrade is what goes back. SQLite cannot alter a column: use `op.batch_alter_table`.

`store.py` declares the same tables on its `metadata`; a test keeps both in step:
`await database.migrate(package)`, then `assert await database.schema_differences(package, metadata) == []`.
The version table carries the service's name, so that services may share one PostgreSQL database.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import sqlalchemy as sa

_REVISION = re.compile(r"""^revision(?:\s*:[^=]+)?\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_DOWN = re.compile(r"""^down_revision(?:\s*:[^=]+)?\s*=\s*(?:None|["']([^"']+)["'])""", re.MULTILINE)


def version_table(package: str) -> str:
    """Table that holds the revision: `alembic_version_registry` for `services.registry.migrations`."""
    return "alembic_version_" + package.removesuffix(".migrations").rsplit(".", 1)[-1]


def lock_key(package: str) -> int:
    """Key of PostgreSQL's advisory lock for the migrations of `package`."""
    return int.from_bytes(hashlib.sha256(package.encode()).digest()[:8], signed=True)


def head_of(folder: Path) -> str:
    """The newest revision in `folder`/versions, read without importing the files.

    Raises:
        ValueError: there is none, or history has two ends.
    """
    return history_of(folder)[0]


def history_of(folder: Path) -> tuple[str, frozenset[str]]:
    """The newest revision in `folder`/versions, and all of them; raises as `head_of` does."""
    revisions: set[str] = set()
    parents: set[str] = set()
    for path in sorted((folder / "versions").glob("[!_]*.py")):
        text = path.read_text()
        revision, down = _REVISION.search(text), _DOWN.search(text)
        if revision is None or down is None:
            raise ValueError(f"{path} does not set revision and down_revision to literals.")
        revisions.add(revision[1])
        parents.add(down[1])
    heads = revisions - parents
    if len(heads) != 1:
        raise ValueError(f"{folder} has {len(heads)} newest revisions {sorted(heads)}; it must have one.")
    return heads.pop(), frozenset(revisions)


def current(connection: sa.Connection, table: str) -> str | None:
    """The revision that the database is at; None when it was never migrated."""
    if not sa.inspect(connection).has_table(table):
        return None
    return connection.execute(sa.text(f"SELECT version_num FROM {table}")).scalar()


def run(metadata: sa.MetaData) -> None:
    """All that a service's env.py does: migrate the connection that `Database.migrate` opened."""
    from alembic import context

    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        version_table=context.config.attributes["version_table"],
        render_as_batch=True,
    )
    # The caller's transaction holds the lock and is the only one: all revisions of an upgrade, or none.
    context.run_migrations()


def upgrade(connection: sa.Connection, folder: Path, table: str, revision: str = "head") -> None:
    """Run every revision that `connection`'s database lacks, up to `revision`, in the caller's transaction."""
    from alembic import command

    command.upgrade(_config(connection, folder, table), revision)


def differences(connection: sa.Connection, metadata: sa.MetaData, table: str) -> list[Any]:
    """What Alembic would change to bring the database to `metadata`: nothing, when migrations are complete."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def ours(_object: Any, name: str | None, kind: str, _reflected: bool, _to: Any) -> bool:
        # Indexes of words are there where PostgreSQL has the extension for them; no metadata can say that.
        optional = kind == "index" and str(name).endswith("_words")
        return not optional and (kind != "table" or not str(name).startswith("alembic_version"))

    options = {"version_table": table, "compare_type": True, "include_object": ours}
    with warnings.catch_warnings():
        # SQLite's indexes of expressions cannot be read back; PostgreSQL's are compared.
        warnings.filterwarnings("ignore", message=".*expression-based index")
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def _config(connection: sa.Connection, folder: Path, table: str) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["version_table"] = table
    return config
