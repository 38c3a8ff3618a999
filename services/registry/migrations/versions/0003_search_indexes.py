"""Indexes for searches: an order each, labels by what is searched for, trigrams of words on PostgreSQL."""

import hashlib
import logging

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

log = logging.getLogger(__name__)

_BATCH = 5000


def upgrade() -> None:
    op.create_index("ix_repositories_by_create_time", "repositories", ["organization", "kind", "create_time", "id"])
    op.create_index("ix_repositories_by_update_time", "repositories", ["organization", "kind", "update_time", "id"])
    op.drop_index("ix_versions_repository_id_create_time", "versions")
    op.create_index("ix_versions_of_repository", "versions", ["repository_id", "create_time", "id"])
    for name, columns in (
        ("create_time", ["create_time"]),
        ("size_bytes", ["size_bytes"]),
        ("build_time", [sa.text("coalesce(build_time, 0)")]),
        ("creator", ["creator", "create_time"]),
        ("updater", ["updater", "create_time"]),
        ("module", ["module", "create_time"]),
    ):
        op.create_index(f"ix_versions_by_{name}", "versions", ["organization", "kind", *columns, "id"])
    not_ready, in_development = sa.text("state != 'READY'"), sa.text("development")
    op.create_index(
        "ix_versions_not_ready",
        "versions",
        ["organization", "kind", "state", "create_time", "id"],
        sqlite_where=not_ready,
        postgresql_where=not_ready,
    )
    op.create_index(
        "ix_versions_in_development",
        "versions",
        ["organization", "kind", "create_time", "id"],
        sqlite_where=in_development,
        postgresql_where=in_development,
    )
    _labels()
    if op.get_bind().dialect.name == "postgresql":
        _trigrams()


def _labels() -> None:
    """A new table in the old one's place, since each row needs what only Python can compute."""
    connection = op.get_bind()
    op.rename_table("labels", "old_labels")
    if connection.dialect.name == "postgresql":
        op.execute("ALTER INDEX pk_labels RENAME TO pk_old_labels")
    op.drop_index("ix_labels_owner_key", "old_labels")
    serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    labels = op.create_table(
        "labels",
        sa.Column("owner", sa.String(length=16), nullable=False),
        sa.Column("owner_id", serial, autoincrement=False, nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("value", sa.String(length=1024), nullable=False),
        sa.Column("key_term", sa.LargeBinary(length=16), nullable=False),
        sa.Column("value_term", sa.LargeBinary(length=16), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "owner_id", "key", name="pk_labels"),
    )
    for owner, table in (("repository", "repositories"), ("version", "versions")):
        last = (-1, "")
        while True:
            old = connection.execute(
                sa.text(
                    "SELECT owner_id, key, value, organization, kind, create_time "
                    f"FROM old_labels JOIN {table} ON {table}.id = owner_id "
                    "WHERE owner = :owner AND (owner_id, key) > (:id, :key) ORDER BY owner_id, key LIMIT :batch"
                ),
                {"owner": owner, "id": last[0], "key": last[1], "batch": _BATCH},
            ).all()
            if not old:
                break
            last = (old[-1].owner_id, old[-1].key)
            op.bulk_insert(
                labels,
                [
                    {
                        "owner": owner,
                        "owner_id": row.owner_id,
                        "key": row.key,
                        "value": row.value,
                        "key_term": _term(row.organization, owner, row.kind, row.key),
                        "value_term": _term(row.organization, owner, row.kind, row.key, row.value),
                        "create_time": row.create_time,
                    }
                    for row in old
                ],
            )
    op.drop_table("old_labels")
    op.create_index("ix_labels_by_key", "labels", ["key_term", "create_time", "owner_id"])
    op.create_index("ix_labels_by_value", "labels", ["value_term", "create_time", "owner_id"])


def _term(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()[:16]


def _trigrams() -> None:
    """Without the extension words are found all the same, by reading: a database may forbid it."""
    connection = op.get_bind()
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS pg_trgm"))
            schema = connection.execute(
                sa.text(
                    "SELECT quote_ident(nspname) FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace "
                    "WHERE extname = 'pg_trgm'"
                )
            ).scalar_one()
            for table, name in (("repositories", "repository"), ("versions", "(repository || ':' || version)")):
                # Without fastupdate: a list of what is not yet indexed would be read by each search.
                connection.execute(
                    sa.text(
                        f"CREATE INDEX ix_{table}_words ON {table} USING gin ({name} {schema}.gin_trgm_ops, "
                        f'lower(description COLLATE "C") {schema}.gin_trgm_ops) WITH (fastupdate = off)'.replace(
                            ":", "\\:"
                        )
                    )
                )
    except sa.exc.DBAPIError as exc:
        log.warning(
            "PostgreSQL's extension pg_trgm cannot be used: words are searched without an index (docs/search.md)",
            extra={"cause": str(exc.orig)},
        )
