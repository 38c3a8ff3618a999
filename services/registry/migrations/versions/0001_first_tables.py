"""The first tables."""

import sqlalchemy as sa
from alembic import op

from services.kernel.db import UtcDateTime

revision = "0001"
down_revision = None

Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "audit_entries",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("entry", sa.String(length=64), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("user_name", sa.String(length=128), nullable=False),
        sa.Column("api_token", sa.String(length=128), nullable=False),
        sa.Column("method", sa.String(length=256), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("trace_id", sa.String(length=64), nullable=False),
        sa.Column("peer", sa.String(length=256), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_entries"),
        sa.UniqueConstraint("entry", name="uq_audit_entries_entry"),
    )
    op.create_index("ix_audit_entries_resource", "audit_entries", ["resource"], unique=False)
    op.create_index("ix_audit_entries_user_name", "audit_entries", ["user_name"], unique=False)
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("claim_end_time", UtcDateTime, nullable=False),
        sa.CheckConstraint("state IN ('CLAIMED', 'STORED', 'DELETING')", name="ck_blobs_state"),
        sa.PrimaryKeyConstraint("digest", name="pk_blobs"),
    )
    op.create_table(
        "labels",
        sa.Column("owner", sa.String(length=16), nullable=False),
        sa.Column("owner_id", Serial, autoincrement=False, nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("value", sa.String(length=1024), nullable=False),
        sa.PrimaryKeyConstraint("owner", "owner_id", "key", name="pk_labels"),
    )
    op.create_index("ix_labels_owner_key", "labels", ["owner", "key"], unique=False)
    op.create_table(
        "logins",
        sa.Column("code_hash", sa.String(length=64), nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("user_id", sa.String(length=63), nullable=False),
        sa.Column("role", sa.Integer(), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("expire_time", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("code_hash", name="pk_logins"),
    )
    op.create_index("ix_logins_expire_time", "logins", ["expire_time"], unique=False)
    op.create_table(
        "organizations",
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("organization", name="pk_organizations"),
    )
    op.create_table(
        "repositories",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("repository", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("creator", sa.String(length=128), nullable=False),
        sa.Column("updater", sa.String(length=128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.CheckConstraint("kind IN ('model', 'bento')", name="ck_repositories_kind"),
        sa.PrimaryKeyConstraint("id", name="pk_repositories"),
        sa.UniqueConstraint("organization", "kind", "repository", name="uq_repositories_organization_kind_repository"),
    )
    op.create_table(
        "secrets",
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("secret", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("items", sa.Text(), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("creator", sa.String(length=128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("organization", "secret", name="pk_secrets"),
    )
    op.create_table(
        "users",
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("user_id", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("first_name", sa.Text(), nullable=False),
        sa.Column("last_name", sa.Text(), nullable=False),
        sa.Column("role", sa.Integer(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["organization"], ["organizations.organization"], name="fk_users_organization"),
        sa.PrimaryKeyConstraint("organization", "user_id", name="pk_users"),
    )
    op.create_table(
        "versions",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("repository_id", Serial, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("repository", sa.String(length=63), nullable=False),
        sa.Column("version", sa.String(length=63), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("creator", sa.String(length=128), nullable=False),
        sa.Column("updater", sa.String(length=128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("update_time", UtcDateTime, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("module", sa.String(length=256), nullable=False),
        sa.Column("bentoml_version", sa.String(length=256), nullable=False),
        sa.Column("development", sa.Boolean(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("build_time", UtcDateTime, nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("upload_start_time", UtcDateTime, nullable=True),
        sa.Column("upload_end_time", UtcDateTime, nullable=True),
        sa.CheckConstraint("(state = 'READY') = (digest IS NOT NULL)", name="ck_versions_ready_has_digest"),
        sa.CheckConstraint(
            "state IN ('PENDING', 'UPLOADING', 'READY', 'FAILED', 'EXTERNAL')", name="ck_versions_state"
        ),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_versions_repository_id"),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.UniqueConstraint(
            "organization", "kind", "repository", "version", name="uq_versions_organization_kind_repository_version"
        ),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"], unique=False)
    op.create_index("ix_versions_repository_id_create_time", "versions", ["repository_id", "create_time"], unique=False)
    op.create_table(
        "api_tokens",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("api_token", sa.String(length=63), nullable=False),
        sa.Column("user_id", sa.String(length=63), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("display_name", sa.String(length=128), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("role", sa.Integer(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("first", sa.Boolean(), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("expire_time", UtcDateTime, nullable=True),
        sa.Column("last_use_time", UtcDateTime, nullable=True),
        sa.ForeignKeyConstraint(
            ["organization", "user_id"],
            ["users.organization", "users.user_id"],
            name="fk_api_tokens_organization_user_id",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_api_tokens"),
        sa.UniqueConstraint("api_token", name="uq_api_tokens_api_token"),
        sa.UniqueConstraint("token_hash", name="uq_api_tokens_token_hash"),
    )
    op.create_index("ix_api_tokens_organization_user_id", "api_tokens", ["organization", "user_id"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("upload", sa.String(length=63), nullable=False),
        sa.Column("organization", sa.String(length=63), nullable=False),
        sa.Column("version_id", Serial, nullable=False),
        sa.Column("resource", sa.String(length=256), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("failure", sa.Text(), nullable=False),
        sa.Column("creator", sa.String(length=128), nullable=False),
        sa.Column("create_time", UtcDateTime, nullable=False),
        sa.Column("expire_time", UtcDateTime, nullable=False),
        sa.CheckConstraint("state IN ('OPEN', 'COMPLETED', 'FAILED', 'ABORTED')", name="ck_uploads_state"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_uploads_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("upload", name="pk_uploads"),
    )
    op.create_index("ix_uploads_state_expire_time", "uploads", ["state", "expire_time"], unique=False)
    op.create_index("ix_uploads_version_id", "uploads", ["version_id"], unique=False)
