"""The registry's tables. Lists and maps are kept as JSON text, states as words, times as microseconds."""

import functools
import hashlib

import sqlalchemy as sa

from services.kernel.db import UtcDateTime

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts up only an INTEGER key.
Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")

organizations = sa.Table(
    "organizations",
    metadata,
    sa.Column("organization", sa.String(63), primary_key=True),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("organization", sa.String(63), sa.ForeignKey("organizations.organization"), primary_key=True),
    sa.Column("user_id", sa.String(63), primary_key=True),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("first_name", sa.Text, nullable=False),
    sa.Column("last_name", sa.Text, nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
)

api_tokens = sa.Table(
    "api_tokens",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    sa.Column("organization", sa.String(63), nullable=False),
    sa.Column("api_token", sa.String(63), nullable=False, unique=True),
    sa.Column("user_id", sa.String(63), nullable=False),
    # sha256 in hex. The token is 256 random bits: no salt and no slow hash could make it harder to guess.
    sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("display_name", sa.String(128), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    # True for the one that is kept in the admin token's file.
    sa.Column("first", sa.Boolean, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("expire_time", UtcDateTime),
    sa.Column("last_use_time", UtcDateTime),
    sa.ForeignKeyConstraint(["organization", "user_id"], ["users.organization", "users.user_id"], ondelete="CASCADE"),
    sa.Index(None, "organization", "user_id"),
)

# Tokens that were deleted: one that still lies in an admin token's file must not come back.
ended_tokens = sa.Table(
    "ended_tokens",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("end_time", UtcDateTime, nullable=False),
)

logins = sa.Table(
    "logins",
    metadata,
    sa.Column("code_hash", sa.String(64), primary_key=True),
    sa.Column("organization", sa.String(63), nullable=False),
    # Empty until somebody approves.
    sa.Column("user_id", sa.String(63), nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("expire_time", UtcDateTime, nullable=False, index=True),
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("organization", sa.String(63), primary_key=True),
    sa.Column("secret", sa.String(63), primary_key=True),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("kind", sa.Integer, nullable=False),
    sa.Column("stage", sa.Integer, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    # Keys and sub paths in the clear, values only in `sealed`.
    sa.Column("items", sa.Text, nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
)

audit_entries = sa.Table(
    "audit_entries",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    sa.Column("organization", sa.String(63), nullable=False),
    sa.Column("entry", sa.String(64), nullable=False, unique=True),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("user_name", sa.String(128), nullable=False, index=True),
    sa.Column("api_token", sa.String(128), nullable=False),
    sa.Column("method", sa.String(256), nullable=False),
    sa.Column("resource", sa.Text, nullable=False, index=True),
    sa.Column("outcome", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("trace_id", sa.String(64), nullable=False),
    sa.Column("peer", sa.String(256), nullable=False),
)

repositories = sa.Table(
    "repositories",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    sa.Column("organization", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("repository", sa.String(63), nullable=False),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("annotations", sa.Text, nullable=False, server_default="{}"),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("updater", sa.String(128), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.UniqueConstraint("organization", "kind", "repository"),
    sa.Index("ix_repositories_by_create_time", "organization", "kind", "create_time", "id"),
    sa.Index("ix_repositories_by_update_time", "organization", "kind", "update_time", "id"),
    sa.CheckConstraint("kind IN ('model', 'bento')", name="kind"),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    sa.Column("repository_id", Serial, sa.ForeignKey("repositories.id"), nullable=False),
    # The three of the repository again: a version is found by one index, without a join.
    sa.Column("organization", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("repository", sa.String(63), nullable=False),
    sa.Column("version", sa.String(63), nullable=False),
    sa.Column("uid", sa.String(36), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("annotations", sa.Text, nullable=False, server_default="{}"),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("updater", sa.String(128), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("update_time", UtcDateTime, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
    sa.Column("module", sa.String(256), nullable=False),
    sa.Column("bentoml_version", sa.String(256), nullable=False),
    sa.Column("development", sa.Boolean, nullable=False),
    sa.Column("models", sa.Text, nullable=False),
    sa.Column("build_time", UtcDateTime),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("digest", sa.String(71)),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("failure", sa.Text, nullable=False),
    sa.Column("upload_start_time", UtcDateTime),
    sa.Column("upload_end_time", UtcDateTime),
    sa.UniqueConstraint("organization", "kind", "repository", "version"),
    sa.CheckConstraint("state IN ('PENDING', 'UPLOADING', 'READY', 'FAILED', 'EXTERNAL')", name="state"),
    sa.CheckConstraint("(state = 'READY') = (digest IS NOT NULL)", name="ready_has_digest"),
    sa.Index(None, "digest"),
    # One for each order in which versions are listed, and for each single thing they are searched by: see searches.py.
    sa.Index("ix_versions_of_repository", "repository_id", "create_time", "id"),
    sa.Index("ix_versions_by_create_time", "organization", "kind", "create_time", "id"),
    sa.Index("ix_versions_by_size_bytes", "organization", "kind", "size_bytes", "id"),
    sa.Index("ix_versions_by_creator", "organization", "kind", "creator", "create_time", "id"),
    sa.Index("ix_versions_by_updater", "organization", "kind", "updater", "create_time", "id"),
    sa.Index("ix_versions_by_module", "organization", "kind", "module", "create_time", "id"),
)

sa.Index(
    "ix_versions_by_build_time",
    versions.c.organization,
    versions.c.kind,
    sa.text("coalesce(build_time, 0)"),
    versions.c.id,
)

# What each alias names now: what is looked up with every read by an alias.
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("organization", sa.String(63), primary_key=True),
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("repository", sa.String(63), primary_key=True),
    sa.Column("alias", sa.String(63), primary_key=True),
    # Without a cascade: a version that an alias names cannot go, whoever forgets to ask.
    sa.Column("version_id", Serial, sa.ForeignKey("versions.id"), nullable=False, index=True),
)

# How it came so. Names, not row ids: a change outlives the versions and the repository that it speaks of.
alias_changes = sa.Table(
    "alias_changes",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    sa.Column("organization", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("repository", sa.String(63), nullable=False),
    sa.Column("alias", sa.String(63), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("user_name", sa.String(128), nullable=False),
    # Versions, by their ids; empty for none.
    sa.Column("before", sa.String(63), nullable=False),
    sa.Column("version", sa.String(63), nullable=False),
    sa.Column("version_uid", sa.String(36), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    # In the order of the numbers time rises, so this finds the one of a moment too.
    sa.UniqueConstraint("organization", "kind", "repository", "alias", "number", name="uq_alias_changes_alias_number"),
)

# Who uses what; see `uses.py`.
uses = sa.Table(
    "uses",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    sa.Column("organization", sa.String(63), nullable=False),
    # Who tells about the use: a deployment for its revisions, a bento for itself.
    sa.Column("owner", sa.String(256), nullable=False),
    sa.Column("owner_uid", sa.String(64), nullable=False),
    sa.Column("consumer", sa.String(256), nullable=False),
    sa.Column("consumer_uid", sa.String(64), nullable=False),
    sa.Column("resource", sa.String(256), nullable=False),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("live", sa.Boolean, nullable=False),
    # The owner's, as of which this was claimed or reported.
    sa.Column("generation", sa.BigInteger, nullable=False),
    # Until when a claim holds that no report has confirmed.
    sa.Column("claim_end_time", UtcDateTime),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("end_time", UtcDateTime),
    sa.UniqueConstraint("organization", "consumer_uid", "resource"),
    sa.Index(None, "organization", "resource"),
    sa.Index(None, "organization", "consumer"),
    sa.Index(None, "organization", "owner"),
    sa.Index(None, "owner_uid"),
    sa.Index(None, "end_time"),
)

# A deleted version until its grace period ends: its whole row, so that it can come back. Apart from `versions`, so that
# no query over those has to leave it out, and its name is free.
deleted_versions = sa.Table(
    "deleted_versions",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    *(sa.Column(c.name, c.type, nullable=c.nullable) for c in versions.c if c.name not in ("id", "repository_id")),
    sa.Column("delete_time", UtcDateTime, nullable=False),
    sa.Column("expire_time", UtcDateTime, nullable=False, index=True),
    sa.Column("deleter", sa.String(128), nullable=False),
    sa.UniqueConstraint("uid"),
    sa.Index(None, "organization", "kind", "repository", "version"),
    sa.Index(None, "organization", "delete_time"),
    sa.Index(None, "digest"),
)

# A deleted repository, as long as a version that was deleted with it may bring it back.
deleted_repositories = sa.Table(
    "deleted_repositories",
    metadata,
    sa.Column("id", Serial, primary_key=True, autoincrement=True),
    *(sa.Column(c.name, c.type, nullable=c.nullable) for c in repositories.c if c.name != "id"),
    sa.Column("delete_time", UtcDateTime, nullable=False),
    sa.Column("expire_time", UtcDateTime, nullable=False, index=True),
    sa.Index(None, "organization", "kind", "repository"),
)

# What an organization keeps, counted as it changes, and the most that it may keep (NULL: no limit). No row: nothing.
quotas = sa.Table(
    "quotas",
    metadata,
    sa.Column("organization", sa.String(63), primary_key=True),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("bytes", "versions", "repositories")),
    *(sa.Column(f"max_{name}", sa.BigInteger) for name in ("bytes", "versions", "repositories")),
    # Of the limits.
    sa.Column("updater", sa.String(128), nullable=False),
    sa.Column("update_time", UtcDateTime),
    sa.Column("revision", sa.Integer, nullable=False),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("owner", sa.String(16), primary_key=True),
    sa.Column("owner_id", Serial, primary_key=True, autoincrement=False),
    sa.Column("key", sa.String(128), primary_key=True),
    sa.Column("value", sa.String(1024), nullable=False),
    # See label_term: what is searched for. A value itself may be too long for an index.
    sa.Column("key_term", sa.LargeBinary(16), nullable=False),
    sa.Column("value_term", sa.LargeBinary(16), nullable=False),
    # The owner's: those of one label are found in the order in which they are listed.
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Index("ix_labels_by_key", "key_term", "create_time", "owner_id"),
    sa.Index("ix_labels_by_value", "value_term", "create_time", "owner_id"),
)


def label_term(organization: str, owner: str, kind: str, key: str, value: str | None = None) -> bytes:
    """16 bytes that stand for a label's key (or key and value) in an organization's repositories or versions of a kind.

    A hash that nobody can make two of, so that whoever has the term has the label. Kept in rows: it never changes.
    """
    parts = (organization, owner, kind, key) if value is None else (organization, owner, kind, key, value)
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()[:16]


uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("upload", sa.String(63), primary_key=True),
    sa.Column("organization", sa.String(63), nullable=False),
    sa.Column("version_id", Serial, sa.ForeignKey("versions.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("resource", sa.String(256), nullable=False),
    sa.Column("digest", sa.String(71), nullable=False),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("failure", sa.Text, nullable=False),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("expire_time", UtcDateTime, nullable=False),
    # Whether the version had content when it was opened.
    sa.Column("replaces", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.CheckConstraint("state IN ('OPEN', 'COMPLETED', 'FAILED', 'ABORTED')", name="state"),
    sa.Index(None, "state", "expire_time"),
)

blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("digest", sa.String(71), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    # Not collected before, whoever names it or not.
    sa.Column("claim_end_time", UtcDateTime, nullable=False),
    # What the collector accounts for: written when a version lets go of the blob, and when it is condemned.
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("holder_organization", sa.String(63)),
    sa.Column("last_holder", sa.String(256)),
    sa.Column("release_time", UtcDateTime),
    sa.CheckConstraint("state IN ('CLAIMED', 'STORED', 'DELETING')", name="state"),
)

collection_holds = sa.Table(
    "collection_holds",
    metadata,
    sa.Column("hold", sa.String(64), primary_key=True),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("expire_time", UtcDateTime, nullable=False),
)

# Whose files are listed. A row for each blob that was ever named; it goes with the blob.
blob_listings = sa.Table(
    "blob_listings",
    metadata,
    sa.Column("digest", sa.String(71), sa.ForeignKey("blobs.digest", ondelete="CASCADE"), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("lease_end_time", UtcDateTime, nullable=False),
    sa.Column("file_count", sa.Integer, nullable=False),
    sa.Column("failure", sa.Text, nullable=False),
    sa.CheckConstraint("state IN ('WAITING', 'WORKING', 'DONE', 'FAILED')", name="state"),
)

blob_files = sa.Table(
    "blob_files",
    metadata,
    sa.Column("digest", sa.String(71), sa.ForeignKey("blob_listings.digest", ondelete="CASCADE"), primary_key=True),
    # In the order of the archive.
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    # sha256 of the path: PostgreSQL indexes no more than 2.7 KB, and a path may have 4.
    sa.Column("path_key", sa.String(64), nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
    sa.Column("mode", sa.Integer, nullable=False),
    sa.Column("file_digest", sa.String(71), nullable=False),
    sa.UniqueConstraint("digest", "path_key"),
)


@functools.cache
def declare_partial_indexes() -> None:
    """Add the indexes that have a condition to the tables, for who migrates these or compares them.

    Not when this module is loaded: SQLAlchemy loads the dialect of PostgreSQL to read such a condition, and a start on
    SQLite, or on tables that are there, does without.
    """
    not_ready, not_done = sa.text("state != 'READY'"), sa.text("state IN ('WAITING', 'WORKING')")
    sa.Index(
        "ix_versions_not_ready",
        *(versions.c[name] for name in ("organization", "kind", "state", "create_time", "id")),
        sqlite_where=not_ready,
        postgresql_where=not_ready,
    )
    sa.Index(
        "ix_versions_in_development",
        *(versions.c[name] for name in ("organization", "kind", "create_time", "id")),
        sqlite_where=versions.c.development,
        postgresql_where=versions.c.development,
    )
    sa.Index(
        "ix_blob_listings_not_done",
        blob_listings.c.lease_end_time,
        sqlite_where=not_done,
        postgresql_where=not_done,
    )
