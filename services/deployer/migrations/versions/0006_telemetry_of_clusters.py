"""Where pods of a cluster that somebody added send their telemetry."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    with op.batch_alter_table("clusters") as batch:
        batch.add_column(sa.Column("otlp_http_endpoint", sa.Text, nullable=False, server_default=""))
