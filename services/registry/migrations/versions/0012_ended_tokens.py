"""Which tokens were deleted, so that none of them comes back by an admin token's file."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "ended_tokens",
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("end_time", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("token_hash", name="pk_ended_tokens"),
    )
