"""When a response began."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("predictions", sa.Column("first_byte_us", sa.BigInteger(), nullable=True))
