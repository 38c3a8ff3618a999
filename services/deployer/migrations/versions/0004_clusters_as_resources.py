"""Clusters that somebody added, and the namespace of each deployment."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.batch_alter_table("clusters") as batch:
        batch.add_column(sa.Column("description", sa.Text, nullable=False, server_default=""))
        batch.add_column(sa.Column("server", sa.Text, nullable=False, server_default=""))
        batch.add_column(sa.Column("namespaces", sa.Text, nullable=False, server_default="[]"))
        batch.add_column(sa.Column("pull_host", sa.Text, nullable=False, server_default=""))
        batch.add_column(sa.Column("pull_secret", sa.Text, nullable=False, server_default=""))
        batch.add_column(sa.Column("key_id", sa.String(64), nullable=False, server_default=""))
        batch.add_column(sa.Column("kubeconfig", sa.LargeBinary, nullable=True))
        batch.add_column(sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"))
        batch.add_column(sa.Column("update_time", sa.BigInteger, nullable=True))
    with op.batch_alter_table("deployments") as batch:
        batch.add_column(sa.Column("kubernetes_namespace", sa.String(63), nullable=False, server_default=""))
