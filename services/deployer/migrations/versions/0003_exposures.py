"""How deployments are reached from outside of their cluster."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("exposure", sa.Text, nullable=False, server_default=""))
    op.add_column("deployments", sa.Column("exposed_host", sa.String(253), nullable=True))
    # An index and no constraint: for that SQLite would make the table anew, and drop the revisions with the old one.
    op.create_index("deployments_exposed_host", "deployments", ["exposed_host"], unique=True)
