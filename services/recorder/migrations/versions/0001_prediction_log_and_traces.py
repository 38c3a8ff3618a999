"""The first tables: prediction log, monitor entries, spans, traces, usage."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _sequence() -> sa.Column[int]:
    # SQLite: INTEGER PRIMARY KEY is the rowid itself.
    type_ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column("sequence", type_, primary_key=True, autoincrement=False)


def _texts(*names: str, length: int | None = None) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.String(length) if length else sa.Text(), nullable=False) for name in names]


def _numbers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=False) for name in names]


def _key(**lengths: int) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.String(length), primary_key=True) for name, length in lengths.items()]


def _index(table: str, name: str, *columns: str) -> None:
    op.create_index(f"ix_{table}_{name}", table, list(columns))


def upgrade() -> None:
    op.create_table(
        "predictions",
        _sequence(),
        *_texts("organization", length=63),
        *_texts("prediction", "deployment", "revision", "target", "bento", length=255),
        *_texts("models"),
        *_texts("replica", "api_token", length=255),
        *_numbers("start_time_us", "latency_us"),
        *_texts("method", "path"),
        *_texts("protocol", length=63),
        sa.Column("status", sa.SmallInteger(), nullable=False),
        *_texts("response_flags", length=255),
        *_texts("trace_id", length=32),
        *_texts("peer", length=255),
        *_texts("request_content_type"),
        *_numbers("request_size_bytes"),
        sa.Column("request_truncated", sa.Boolean(), nullable=False),
        *_texts("response_content_type"),
        *_numbers("response_size_bytes"),
        sa.Column("response_truncated", sa.Boolean(), nullable=False),
        sa.UniqueConstraint("organization", "prediction", name="uq_predictions_organization_prediction"),
    )
    order = ("start_time_us", "sequence")
    _index("predictions", "time", "organization", *order)
    _index("predictions", "status", "organization", "status", *order)
    _index("predictions", "deployment", "organization", "deployment", *order)
    _index("predictions", "deployment_status", "organization", "deployment", "status", *order)
    _index("predictions", "trace", "organization", "trace_id", *order)
    op.create_table(
        "prediction_bodies",
        _sequence(),
        *_texts("request_headers"),
        sa.Column("request_body", sa.LargeBinary(), nullable=False),
        *_texts("response_headers"),
        sa.Column("response_body", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "monitor_entries",
        _sequence(),
        *_texts("organization", length=63),
        sa.Column("fingerprint", sa.LargeBinary(16), nullable=False),
        *_texts("monitor"),
        *_numbers("time_ns"),
        *_texts("trace_id", length=32),
        *_texts("deployment", length=255),
        *_texts("data"),
        sa.UniqueConstraint("fingerprint", name="uq_monitor_entries_fingerprint"),
    )
    _index("monitor_entries", "trace", "organization", "trace_id")
    op.create_table(
        "spans",
        *_key(organization=63, trace_id=32, span_id=16),
        *_texts("parent_span_id", length=16),
        *_texts("service", length=255),
        *_texts("display_name"),
        *_texts("kind", length=16),
        *_numbers("start_ns", "end_ns"),
        sa.Column("error", sa.Boolean(), nullable=False),
        *_texts("status_message", "attributes"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "traces",
        *_key(organization=63, trace_id=32),
        *_numbers("start_ns", "end_ns"),
        sa.Column("span_count", sa.Integer(), nullable=False),
        sa.Column("error_count", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        *_texts("root_span_id", "root_parent_span_id", length=16),
        *_numbers("root_start_ns"),
        *_texts("root"),
        *_numbers("updated_us"),
    )
    _index("traces", "time", "organization", "start_ns", "trace_id")
    _index("traces", "failed", "organization", "failed", "start_ns", "trace_id")
    _index("traces", "updated", "updated_us")
    op.create_table(
        "trace_services",
        *_key(organization=63, trace_id=32, service=255),
        *_numbers("start_ns"),
    )
    _index("trace_services", "service", "organization", "service", "start_ns", "trace_id")
    op.create_table(
        "log_usage",
        sa.Column("log", sa.String(16), primary_key=True),
        sa.Column("minute", sa.BigInteger(), primary_key=True, autoincrement=False),
        *_numbers("size_bytes"),
    )
