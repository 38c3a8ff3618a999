"""Builds and environments."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "environments",
        sa.Column("digest", sa.String(80), primary_key=True),
        sa.Column("python_version", sa.String(32), nullable=False),
        sa.Column("bentoml_version", sa.String(64), nullable=False),
        sa.Column("package_count", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("use_time", UtcDateTime, nullable=False),
    )
    op.create_table(
        "builds",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("uid", sa.String(64), nullable=False),
        sa.Column("organization", sa.String(128), nullable=False),
        sa.Column("bento", sa.String(255), nullable=False),
        sa.Column("bento_digest", sa.String(80), nullable=False),
        sa.Column("dedup_key", sa.String(64), nullable=False),
        sa.Column("active_key", sa.String(200), nullable=True),
        sa.Column("secrets", sa.Text, nullable=False),
        sa.Column("force", sa.Boolean, nullable=False),
        sa.Column("creator", sa.String(128), nullable=False),
        sa.Column("traceparent", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("step", sa.String(128), nullable=False),
        sa.Column("progress_percent", sa.Integer, nullable=False),
        sa.Column("failure", sa.Text, nullable=True),
        sa.Column("environment", sa.String(80), sa.ForeignKey("environments.digest"), nullable=True),
        sa.Column("cached", sa.Boolean, nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("start_time", UtcDateTime, nullable=True),
        sa.Column("end_time", UtcDateTime, nullable=True),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("lease_token", sa.String(64), nullable=True),
        sa.Column("lease_owner", sa.String(64), nullable=True),
        sa.Column("lease_expire_time", UtcDateTime, nullable=True),
        sa.CheckConstraint("state IN ('QUEUED', 'RUNNING', 'SUCCEEDED', 'FAILED', 'CANCELLED')", name="builds_state"),
    )
    op.create_index("builds_by_time", "builds", ["organization", "create_time", "id"])
    op.create_index("builds_by_bento", "builds", ["organization", "bento", "create_time"])
    op.create_index("builds_by_state", "builds", ["state", "create_time"])
    op.create_index("builds_active", "builds", ["active_key"], unique=True)
    op.create_index("builds_by_key", "builds", ["organization", "dedup_key"])
