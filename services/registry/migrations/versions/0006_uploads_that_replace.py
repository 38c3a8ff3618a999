"""Whether an upload was opened to replace content."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # An upload that is open meanwhile, or that a replica of before opens, may replace: as before.
    op.add_column("uploads", sa.Column("replaces", sa.Boolean(), nullable=False, server_default=sa.true()))
