"""Annotations of versions and repositories, deleted ones too."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    # With a default, so that neither database writes the rows that are there anew.
    for table in ("repositories", "versions", "deleted_repositories", "deleted_versions"):
        op.add_column(table, sa.Column("annotations", sa.Text(), nullable=False, server_default="{}"))
