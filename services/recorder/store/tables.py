"""The recorder's tables.

`sequence` is the order in which rows were committed: microseconds since the epoch when a row was written, moved up to
be unique (see `writes.py`). So it serves as primary key, as cursor of a tail, and as age for retention.

Every filter of a list is a prefix of an index which ends in the order of the list; SQLite and PostgreSQL then walk
the index backwards and stop at the page's end, whatever the size of the log.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s"})

# SQLite: `INTEGER PRIMARY KEY` is the rowid itself, which saves an index; BIGINT would not be.
_SEQUENCE = BigInteger().with_variant(Integer(), "sqlite")

predictions = Table(
    "predictions",
    metadata,
    Column("sequence", _SEQUENCE, primary_key=True, autoincrement=False),
    Column("organization", String(63), nullable=False),
    Column("prediction", String(255), nullable=False),
    Column("deployment", String(255), nullable=False),
    Column("revision", String(255), nullable=False),
    Column("target", String(255), nullable=False),
    Column("bento", String(255), nullable=False),
    Column("models", Text, nullable=False),
    Column("replica", String(255), nullable=False),
    Column("api_token", String(255), nullable=False),
    Column("start_time_us", BigInteger, nullable=False),
    Column("latency_us", BigInteger, nullable=False),
    Column("method", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("protocol", String(63), nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("response_flags", String(255), nullable=False),
    Column("trace_id", String(32), nullable=False),
    Column("peer", String(255), nullable=False),
    Column("request_content_type", Text, nullable=False),
    Column("request_size_bytes", BigInteger, nullable=False),
    Column("request_truncated", Boolean, nullable=False),
    Column("response_content_type", Text, nullable=False),
    Column("response_size_bytes", BigInteger, nullable=False),
    Column("response_truncated", Boolean, nullable=False),
    Column("first_byte_us", BigInteger),
    UniqueConstraint("organization", "prediction"),
    Index("ix_predictions_time", "organization", "start_time_us", "sequence"),
    Index("ix_predictions_status", "organization", "status", "start_time_us", "sequence"),
    Index("ix_predictions_deployment", "organization", "deployment", "start_time_us", "sequence"),
    Index("ix_predictions_deployment_status", "organization", "deployment", "status", "start_time_us", "sequence"),
    Index("ix_predictions_trace", "organization", "trace_id", "start_time_us", "sequence"),
)

# Apart from `predictions`, so that a list reads only what it shows.
prediction_bodies = Table(
    "prediction_bodies",
    metadata,
    Column("sequence", _SEQUENCE, primary_key=True, autoincrement=False),
    Column("request_headers", Text, nullable=False),
    Column("request_body", LargeBinary, nullable=False),
    Column("response_headers", Text, nullable=False),
    Column("response_body", LargeBinary, nullable=False),
)

monitor_entries = Table(
    "monitor_entries",
    metadata,
    Column("sequence", _SEQUENCE, primary_key=True, autoincrement=False),
    Column("organization", String(63), nullable=False),
    # Hash of the entry: whoever sends it twice, because the first answer was lost, has it kept once.
    Column("fingerprint", LargeBinary(16), nullable=False),
    Column("monitor", Text, nullable=False),
    Column("time_ns", BigInteger, nullable=False),
    Column("trace_id", String(32), nullable=False),
    Column("deployment", String(255), nullable=False),
    Column("data", Text, nullable=False),
    UniqueConstraint("fingerprint"),
    Index("ix_monitor_entries_trace", "organization", "trace_id"),
)

spans = Table(
    "spans",
    metadata,
    Column("organization", String(63), primary_key=True),
    Column("trace_id", String(32), primary_key=True),
    Column("span_id", String(16), primary_key=True),
    Column("parent_span_id", String(16), nullable=False),
    Column("service", String(255), nullable=False),
    Column("display_name", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("start_ns", BigInteger, nullable=False),
    Column("end_ns", BigInteger, nullable=False),
    Column("error", Boolean, nullable=False),
    Column("status_message", Text, nullable=False),
    Column("attributes", Text, nullable=False),
    # One B-tree, ordered by trace: the spans of a trace lie together, and there is no second index to write.
    sqlite_with_rowid=False,
)

# Sums of `spans`, kept with each write: a list of traces reads no span.
traces = Table(
    "traces",
    metadata,
    Column("organization", String(63), primary_key=True),
    Column("trace_id", String(32), primary_key=True),
    Column("start_ns", BigInteger, nullable=False),
    Column("end_ns", BigInteger, nullable=False),
    Column("span_count", Integer, nullable=False),
    Column("error_count", Integer, nullable=False),
    Column("failed", Boolean, nullable=False),
    Column("root_span_id", String(16), nullable=False),
    Column("root_parent_span_id", String(16), nullable=False),
    Column("root_start_ns", BigInteger, nullable=False),
    Column("root", Text, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    Index("ix_traces_updated", "updated_us"),
    Index("ix_traces_time", "organization", "start_ns", "trace_id"),
    Index("ix_traces_failed", "organization", "failed", "start_ns", "trace_id"),
)

# `start_ns` is the trace's own: "newest traces of a service" is then a walk along one index.
trace_services = Table(
    "trace_services",
    metadata,
    Column("organization", String(63), primary_key=True),
    Column("trace_id", String(32), primary_key=True),
    Column("service", String(255), primary_key=True),
    Column("start_ns", BigInteger, nullable=False),
    Index("ix_trace_services_service", "organization", "service", "start_ns", "trace_id"),
)

# Bytes written in each minute, per log: retention by size reads this instead of summing up the log.
log_usage = Table(
    "log_usage",
    metadata,
    Column("log", String(16), primary_key=True),
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("size_bytes", BigInteger, nullable=False),
)
