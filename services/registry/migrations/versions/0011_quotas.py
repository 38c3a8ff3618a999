"""What each organization keeps, counted once from what is there, and limits."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0011"
down_revision = "0010"

_COUNT = """
INSERT INTO quotas (organization, bytes, versions, repositories, updater, revision)
SELECT o.organization,
  COALESCE((SELECT SUM(c.size_bytes) FROM (
    SELECT digest, size_bytes, organization FROM versions WHERE digest IS NOT NULL
    UNION SELECT digest, size_bytes, organization FROM deleted_versions WHERE digest IS NOT NULL
  ) AS c WHERE c.organization = o.organization), 0),
  (SELECT COUNT(*) FROM versions v WHERE v.organization = o.organization),
  (SELECT COUNT(*) FROM repositories r WHERE r.organization = o.organization),
  '', 0
FROM (SELECT organization FROM repositories UNION SELECT organization FROM deleted_versions) AS o
"""


def upgrade() -> None:
    op.create_table(
        "quotas",
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("versions", sa.BigInteger(), nullable=False),
        sa.Column("repositories", sa.BigInteger(), nullable=False),
        sa.Column("max_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_versions", sa.BigInteger(), nullable=True),
        sa.Column("max_repositories", sa.BigInteger(), nullable=True),
        sa.Column("updater", sa.String(length=128), nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("organization", name="pk_quotas"),
    )
    op.execute(_COUNT)
