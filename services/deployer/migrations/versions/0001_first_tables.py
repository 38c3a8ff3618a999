"""Deployments, revisions, the route table's version, clusters."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "deployments",
        sa.Column("uid", sa.String(36), primary_key=True),
        sa.Column("organization", sa.String(128), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("cluster", sa.String(63), nullable=False),
        sa.Column("scaling", sa.Text, nullable=False),
        sa.Column("capture", sa.Text, nullable=False),
        sa.Column("access_authorization", sa.Boolean, nullable=False),
        sa.Column("dev", sa.Boolean, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("latest_revision", sa.Integer, nullable=False),
        sa.Column("terminated", sa.Boolean, nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
        sa.Column("port", sa.Integer, nullable=True),
        sa.Column("build", sa.String(128), nullable=False),
        sa.Column("traceparent", sa.String(64), nullable=False),
        sa.Column("creator", sa.String(128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.UniqueConstraint("organization", "name", name="deployments_name"),
        sa.UniqueConstraint("port", name="deployments_port"),
    )
    op.create_table(
        "revisions",
        sa.Column(
            "deployment_uid", sa.String(36), sa.ForeignKey("deployments.uid", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("uid", sa.String(36), nullable=False),
        sa.Column("template", sa.Text, nullable=False),
        sa.Column("bentos", sa.Text, nullable=False),
        sa.Column("creator", sa.String(128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("rolled_back_to", sa.Integer, nullable=False),
    )
    op.create_table(
        "route_tables",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "clusters",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("uid", sa.String(36), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
    )
