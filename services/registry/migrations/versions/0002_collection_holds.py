"""Holds: while one stands, no blob is condemned."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "collection_holds",
        sa.Column("hold", sa.String(length=64), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("expire_time", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("hold", name="pk_collection_holds"),
    )
