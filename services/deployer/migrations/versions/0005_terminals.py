"""Terminals into replicas, and their recordings."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "terminals",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("organization", sa.String(128), nullable=False),
        sa.Column("deployment", sa.String(63), nullable=False),
        sa.Column("deployment_uid", sa.String(36), nullable=False),
        sa.Column("replica", sa.String(253), nullable=False),
        sa.Column("service", sa.String(128), nullable=False),
        sa.Column("command", sa.JSON, nullable=False),
        sa.Column("tty", sa.Boolean, nullable=False),
        sa.Column("debug_image", sa.Text, nullable=False),
        sa.Column("user", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("exit_code", sa.Integer, nullable=True),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("end_time", UtcDateTime, nullable=True),
        sa.Column("owner", sa.String(64), nullable=False),
    )
    op.create_index("terminals_by_deployment", "terminals", ["organization", "deployment", "create_time"])
    op.create_table(
        "terminal_pieces",
        sa.Column("terminal", sa.String(63), sa.ForeignKey("terminals.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
    )
