"""Builds that make images and have priorities, and the images."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("builds") as batch:
        batch.add_column(sa.Column("output", sa.String(16), nullable=False, server_default="ENVIRONMENT"))
        batch.add_column(sa.Column("platforms", sa.Text, nullable=False, server_default="[]"))
        batch.add_column(sa.Column("base", sa.String(512), nullable=False, server_default=""))
        batch.add_column(sa.Column("image", sa.String(64), nullable=True))
        batch.add_column(sa.Column("priority", sa.Integer, nullable=False, server_default="2"))
        batch.add_column(sa.Column("turn_time", UtcDateTime, nullable=True))
    op.create_table(
        "images",
        sa.Column("organization", sa.String(128), primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("place", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("media_type", sa.String(128), nullable=False),
        sa.Column("bento", sa.String(255), nullable=False),
        sa.Column("bento_digest", sa.String(80), nullable=False),
        sa.Column("repository", sa.String(255), nullable=False),
        sa.Column("tag", sa.String(128), nullable=True),
        sa.Column("platforms", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("layers", sa.Text, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("models", sa.Text, nullable=False),
        sa.Column("build", sa.String(64), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("use_time", UtcDateTime, nullable=False),
    )
    op.create_index("images_by_time", "images", ["organization", "create_time", "id"])
    op.create_index("images_by_bento", "images", ["organization", "bento", "create_time"])
    op.create_index("images_by_tag", "images", ["place", "repository", "tag"])
