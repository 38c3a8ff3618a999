"""The files of contents, and whose are to be listed: those of every content that there is."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "blob_listings",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("lease_end_time", UtcDateTime, nullable=False),
        sa.Column("file_count", sa.Integer(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.CheckConstraint("state IN ('WAITING', 'WORKING', 'DONE', 'FAILED')", name="ck_blob_listings_state"),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name="fk_blob_listings_digest", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("digest", name="pk_blob_listings"),
    )
    not_done = sa.text("state IN ('WAITING', 'WORKING')")
    op.create_index(
        "ix_blob_listings_not_done",
        "blob_listings",
        ["lease_end_time"],
        sqlite_where=not_done,
        postgresql_where=not_done,
    )
    op.create_table(
        "blob_files",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("path_key", sa.String(length=64), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("mode", sa.Integer(), nullable=False),
        sa.Column("file_digest", sa.String(length=71), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["blob_listings.digest"], name="fk_blob_files_digest", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("digest", "number", name="pk_blob_files"),
        sa.UniqueConstraint("digest", "path_key", name="uq_blob_files_digest_path_key"),
    )
    op.execute(
        "INSERT INTO blob_listings (digest, state, lease_end_time, file_count, failure)"
        " SELECT digest, 'WAITING', 0, 0, '' FROM blobs WHERE state = 'STORED'"
    )
