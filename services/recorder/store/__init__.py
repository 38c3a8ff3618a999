"""The recorder's tables and queries; each returns domain objects. One implementation for SQLite and PostgreSQL.

`tables.py` holds the tables, `writes.py` what every write shares (order, space, usage), `predictions.py`
the prediction log with monitor entries, `traces.py` spans and the summaries of their traces.
"""

from services.recorder.store.predictions import PredictionStore, Row
from services.recorder.store.tables import metadata
from services.recorder.store.traces import TraceStore
from services.recorder.store.usage import UsageStore
from services.recorder.store.writes import PREDICTIONS, TRACES, Writer

__all__ = ["PREDICTIONS", "TRACES", "PredictionStore", "Row", "TraceStore", "UsageStore", "Writer", "metadata"]
