"""Leases that are renewed by counting instead of by time, and builds that belong to a folder of environments."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("builds") as batch:
        batch.drop_column("lease_expire_time")
        batch.add_column(sa.Column("lease_renewals", sa.BigInteger, nullable=False, server_default="0"))
        batch.add_column(sa.Column("site", sa.String(64), nullable=False, server_default=""))
