"""The recorder: what was predicted, and how each call went. Never in the path of a request.

Terms: a *prediction* is one captured request to a deployment with its response; a *monitor entry* is one record that
`bentoml.monitor()` logged; a *span* is one step of a *trace*.

Invariants:
- What was answered for is kept: a call that records answers after its transaction is committed.
- Recording twice is recording once: predictions by name, spans by trace and span id, monitor entries by content.
- Every row has an organization, and a caller sees only its own organization's.
- Nothing here blocks whoever is observed: a full disk is UNAVAILABLE to the sender, who keeps its data and tries again.

Files:
- `domain.py`       predictions, spans, filters, and how a trace is summed up; pure
- `store.py`        what both logs share: tables' metadata, ordering of writes, usage, translated errors
- `prediction_store.py`, `trace_store.py`   the two logs in SQL
- `predictions.py`, `traces.py`   use cases
- `messages.py`     protos of the recorder's API, to and from domain objects
- `otlp.py`         OpenTelemetry's protos to domain objects
- `servicer.py`     gRPC: Predictions, Traces, and OTLP's TraceService, LogsService and MetricsService
- `receiver.py`     OTLP over HTTP, for replicas
- `forwarder.py`    sends what OTLP brought to another OTLP endpoint
- `retention.py`    loop: forgets by age and by size
"""
