"""Tables of the builder."""

import sqlalchemy as sa

from services.kernel.db import UtcDateTime

metadata = sa.MetaData()

environments = sa.Table(
    "environments",
    metadata,
    sa.Column("digest", sa.String(80), primary_key=True),
    sa.Column("python_version", sa.String(32), nullable=False),
    sa.Column("bentoml_version", sa.String(64), nullable=False),
    sa.Column("package_count", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("use_time", UtcDateTime, nullable=False),
)

builds = sa.Table(
    "builds",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("uid", sa.String(64), nullable=False),
    sa.Column("organization", sa.String(128), nullable=False),
    sa.Column("bento", sa.String(255), nullable=False),
    sa.Column("bento_digest", sa.String(80), nullable=False),
    sa.Column("dedup_key", sa.String(64), nullable=False),
    sa.Column("active_key", sa.String(200), nullable=True),
    sa.Column("secrets", sa.Text, nullable=False),
    sa.Column("force", sa.Boolean, nullable=False),
    sa.Column("creator", sa.String(128), nullable=False),
    sa.Column("traceparent", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("step", sa.String(128), nullable=False),
    sa.Column("progress_percent", sa.Integer, nullable=False),
    sa.Column("failure", sa.Text, nullable=True),
    sa.Column("environment", sa.String(80), sa.ForeignKey("environments.digest"), nullable=True),
    sa.Column("cached", sa.Boolean, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("start_time", UtcDateTime, nullable=True),
    sa.Column("end_time", UtcDateTime, nullable=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("lease_token", sa.String(64), nullable=True),
    sa.Column("lease_owner", sa.String(64), nullable=True),
    # Counted up by who holds the lease: a sign of life.
    sa.Column("lease_renewals", sa.BigInteger, nullable=False, server_default="0"),
    # Whose folder it is built in. Empty for builds from before there were several.
    sa.Column("site", sa.String(64), nullable=False, server_default=""),
    sa.Column("output", sa.String(16), nullable=False, server_default="ENVIRONMENT"),
    sa.Column("platforms", sa.Text, nullable=False, server_default="[]"),
    sa.Column("base", sa.String(512), nullable=False, server_default=""),
    sa.Column("image", sa.String(64), nullable=True),
    sa.Column("priority", sa.Integer, nullable=False, server_default="2"),
    # By which those that wait are ordered; absent for builds of a release that knew no priorities.
    sa.Column("turn_time", UtcDateTime, nullable=True),
    sa.CheckConstraint("state IN ('QUEUED', 'RUNNING', 'SUCCEEDED', 'FAILED', 'CANCELLED')", name="builds_state"),
    sa.Index("builds_by_time", "organization", "create_time", "id"),
    sa.Index("builds_by_bento", "organization", "bento", "create_time"),
    sa.Index("builds_by_state", "state", "create_time"),
    sa.Index("builds_by_key", "organization", "dedup_key"),
    # One build at a time answers for a dedup key. A forced one stands beside it and one that ended makes room: both
    # have NULL here, of which there may be many. (A partial index is shorter, and loads both dialects at the start.)
    sa.Index("builds_active", "active_key", unique=True),
)

images = sa.Table(
    "images",
    metadata,
    sa.Column("organization", sa.String(128), primary_key=True),
    sa.Column("id", sa.String(64), primary_key=True),
    # Where it is kept: images of equal digest may lie in the folders of several builders.
    sa.Column("place", sa.String(255), primary_key=True),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("media_type", sa.String(128), nullable=False),
    sa.Column("bento", sa.String(255), nullable=False),
    sa.Column("bento_digest", sa.String(80), nullable=False),
    sa.Column("repository", sa.String(255), nullable=False),
    # NULL once another image has it.
    sa.Column("tag", sa.String(128), nullable=True),
    sa.Column("platforms", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("layers", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("models", sa.Text, nullable=False),
    sa.Column("build", sa.String(64), nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("use_time", UtcDateTime, nullable=False),
    sa.Index("images_by_time", "organization", "create_time", "id"),
    sa.Index("images_by_bento", "organization", "bento", "create_time"),
    sa.Index("images_by_tag", "place", "repository", "tag"),
)
