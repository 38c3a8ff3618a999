"""Deleted versions and repositories, until their grace period ends."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0005"
down_revision = "0004"

Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "deleted_repositories",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("repository", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("creator", sa.String(length=128), nullable=False),
        sa.Column("updater", sa.String(length=128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("delete_time", UtcDateTime, nullable=False),
        sa.Column("expire_time", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deleted_repositories"),
    )
    op.create_index("ix_deleted_repositories_expire_time", "deleted_repositories", ["expire_time"])
    op.create_index(
        "ix_deleted_repositories_organization_kind_repository",
        "deleted_repositories",
        ["organization", "kind", "repository"],
    )
    op.create_table(
        "deleted_versions",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("repository", sa.String(length=63), nullable=False),
        sa.Column("version", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("creator", sa.String(length=128), nullable=False),
        sa.Column("updater", sa.String(length=128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("module", sa.String(length=256), nullable=False),
        sa.Column("bentoml_version", sa.String(length=256), nullable=False),
        sa.Column("development", sa.Boolean(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("build_time", UtcDateTime, nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("upload_start_time", UtcDateTime, nullable=True),
        sa.Column("upload_end_time", UtcDateTime, nullable=True),
        sa.Column("delete_time", UtcDateTime, nullable=False),
        sa.Column("expire_time", UtcDateTime, nullable=False),
        sa.Column("deleter", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deleted_versions"),
        sa.UniqueConstraint("uid", name="uq_deleted_versions_uid"),
    )
    op.create_index("ix_deleted_versions_digest", "deleted_versions", ["digest"])
    op.create_index("ix_deleted_versions_expire_time", "deleted_versions", ["expire_time"])
    op.create_index("ix_deleted_versions_organization_delete_time", "deleted_versions", ["organization", "delete_time"])
    op.create_index(
        "ix_deleted_versions_organization_kind_repository_version",
        "deleted_versions",
        ["organization", "kind", "repository", "version"],
    )
