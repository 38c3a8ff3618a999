"""Of a blob, its size and who named it last, so that its end can be accounted for."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("blobs", sa.Column("size_bytes", sa.BigInteger(), nullable=True))
    op.add_column("blobs", sa.Column("holder_organization", sa.String(length=63), nullable=True))
    op.add_column("blobs", sa.Column("last_holder", sa.String(length=256), nullable=True))
    op.add_column("blobs", sa.Column("release_time", UtcDateTime, nullable=True))
