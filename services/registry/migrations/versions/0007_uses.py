"""Who uses what; the models that bentos use are read from what is known of their manifests."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0007"
down_revision = "0006"

Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_BATCH = 5000


def upgrade() -> None:
    uses = op.create_table(
        "uses",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("owner", sa.String(length=256), nullable=False),
        sa.Column("owner_uid", sa.String(length=64), nullable=False),
        sa.Column("consumer", sa.String(length=256), nullable=False),
        sa.Column("consumer_uid", sa.String(length=64), nullable=False),
        sa.Column("resource", sa.String(length=256), nullable=False),
        sa.Column("digest", sa.String(length=80), nullable=False),
        sa.Column("live", sa.Boolean(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("claim_end_time", UtcDateTime, nullable=True),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("end_time", UtcDateTime, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_uses"),
        sa.UniqueConstraint(
            "organization", "consumer_uid", "resource", name="uq_uses_organization_consumer_uid_resource"
        ),
    )
    op.create_index("ix_uses_organization_resource", "uses", ["organization", "resource"])
    op.create_index("ix_uses_organization_consumer", "uses", ["organization", "consumer"])
    op.create_index("ix_uses_organization_owner", "uses", ["organization", "owner"])
    op.create_index("ix_uses_owner_uid", "uses", ["owner_uid"])
    op.create_index("ix_uses_end_time", "uses", ["end_time"])
    _bentos(uses)


def _bentos(uses: sa.Table) -> None:
    connection, after = op.get_bind(), 0
    statement = sa.text(
        "SELECT id, organization, repository, version, uid, models, create_time FROM versions "
        "WHERE id > :after AND kind = 'bento' AND models != '[]' ORDER BY id LIMIT :batch"
    ).columns(create_time=UtcDateTime)
    while True:
        bentos = connection.execute(statement, {"after": after, "batch": _BATCH}).all()
        rows: list[dict[str, Any]] = [
            {
                "organization": bento.organization,
                "owner": f"bentoRepositories/{bento.repository}/bentos/{bento.version}",
                "owner_uid": bento.uid,
                "consumer": f"bentoRepositories/{bento.repository}/bentos/{bento.version}",
                "consumer_uid": bento.uid,
                "resource": model,
                "digest": "",
                "live": True,
                "generation": 0,
                "create_time": bento.create_time,
            }
            for bento in bentos
            for model in dict.fromkeys(json.loads(bento.models))
        ]
        if rows:
            connection.execute(uses.insert(), rows)
        if len(bentos) < _BATCH:
            return
        after = bentos[-1].id
