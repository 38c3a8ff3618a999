"""OpenTelemetry's protos to spans and monitor entries.

Sources: opentelemetry-proto, trace/v1/trace.proto and logs/v1/logs.proto; OTLP specification 1.x, "JSON Protobuf
Encoding" (ids in hex, where proto3's own JSON would have base64).
"""

import ast
import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1 import trace_pb2

from services.recorder.domain import (
    MAX_ATTRIBUTE_CHARS,
    MAX_ATTRIBUTES,
    MAX_MONITOR_DATA_BYTES,
    MonitorEntry,
    Span,
)

# Resource attribute that the deployer sets for its replicas.
DEPLOYMENT = "ekiben.deployment"
# Set on a span by the component that made it: in standalone, five services share one process and one resource.
COMPONENT = "ekiben.component"
# Name of the logger that BentoML's OTLPMonitor writes to; newer SDKs make it the scope's name.
_MONITOR_LOGGER = "bentoml_monitor_data"
# Columns that OTLPMonitor adds to each record (bentoml/_internal/monitoring/otlp.py, PRESERVED_COLUMNS).
_TIME, _TRACE, _META = "timestamp", "trace_id", "bento_meta"

_KINDS = {
    trace_pb2.Span.SPAN_KIND_SERVER: "SERVER",
    trace_pb2.Span.SPAN_KIND_CLIENT: "CLIENT",
    trace_pb2.Span.SPAN_KIND_PRODUCER: "PRODUCER",
    trace_pb2.Span.SPAN_KIND_CONSUMER: "CONSUMER",
}
_MAX_TIME_NS = 2**63 - 1
_MAX_NAME = 255
_PRINTED_NAME = re.compile(r"'monitor_name': '([^']*)'")
# Nesting of values: a JSON text deeper than this is of no use to a reader.
_MAX_DEPTH = 16


def spans_of(request: ExportTraceServiceRequest, *, organization: str) -> tuple[list[Span], int]:
    """The spans of an export, and how many had to be refused because their ids are not valid ones.

    Whose they are the receiver says, never the sender: replicas run code of strangers.
    """
    spans: list[Span] = []
    refused = 0
    for resource_spans in request.resource_spans:
        resource = attributes_of(resource_spans.resource.attributes)
        service = resource.get("service.name", "")
        inherited = {key: value for key, value in resource.items() if key.startswith("ekiben.")}
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                if (
                    len(span.trace_id) != 16
                    or len(span.span_id) != 8
                    or not any(span.trace_id)
                    or not any(span.span_id)
                ):
                    refused += 1
                else:
                    spans.append(_span(span, organization, service, inherited))
    return spans, refused


def monitor_entries_of(
    request: ExportLogsServiceRequest, *, organization: str, now_ns: int
) -> tuple[list[MonitorEntry], int]:
    """What `bentoml.monitor()` logged, of an export of logs, and how many other records were passed over."""
    entries: list[MonitorEntry] = []
    others = 0
    for resource_logs in request.resource_logs:
        resource = attributes_of(resource_logs.resource.attributes)
        for scope_logs in resource_logs.scope_logs:
            for record in scope_logs.log_records:
                entry = _monitor_entry(record, scope_logs.scope.name, resource, organization, now_ns)
                if entry is None:
                    others += 1
                else:
                    entries.append(entry)
    return entries, others


def attributes_of(pairs: Iterable[KeyValue]) -> dict[str, str]:
    """Attributes as text, each value cut to 4,096 characters, the first 128 of them."""
    attributes: dict[str, str] = {}
    for pair in pairs:
        if len(attributes) == MAX_ATTRIBUTES:
            break
        attributes[pair.key[:_MAX_NAME]] = _text(pair.value)
    return attributes


def parse_json(data: bytes, into: Message) -> None:
    """Fill `into` from OTLP's JSON encoding.

    Raises:
        ValueError: not JSON, or not of that message.
    """
    try:
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("not OTLP JSON: not an object")
        json_format.ParseDict(_ids_to_base64(document), into, ignore_unknown_fields=True)
    except (json_format.ParseError, TypeError, AttributeError, RecursionError) as exc:
        raise ValueError(f"not OTLP JSON: {exc}") from exc


def _span(span: trace_pb2.Span, organization: str, service: str, inherited: Mapping[str, str]) -> Span:
    attributes = attributes_of(span.attributes)
    for key, value in inherited.items():
        attributes.setdefault(key, value)
    error = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    if error:
        # An exception is an event of its span; a reader of the waterfall looks at the attributes.
        for event in span.events:
            if event.name == "exception":
                for key, value in attributes_of(event.attributes).items():
                    attributes.setdefault(key, value)
    start_ns = min(span.start_time_unix_nano, _MAX_TIME_NS)
    return Span(
        organization=organization,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() if len(span.parent_span_id) == 8 and any(span.parent_span_id) else "",
        service=(attributes.get(COMPONENT) or service or "unknown")[:_MAX_NAME],
        display_name=_clean(span.name)[:_MAX_NAME],
        kind=_KINDS.get(span.kind, "INTERNAL"),
        start_ns=start_ns,
        end_ns=max(start_ns, min(span.end_time_unix_nano, _MAX_TIME_NS)),
        error=error,
        status_message=_clean(span.status.message)[:MAX_ATTRIBUTE_CHARS],
        attributes=attributes,
    )


def _monitor_entry(
    record: LogRecord, scope: str, resource: Mapping[str, str], organization: str, now_ns: int
) -> MonitorEntry | None:
    body = _record(record.body)
    if body is None:
        return None
    meta = body.get(_META)
    if scope != _MONITOR_LOGGER and not isinstance(meta, dict):
        return None
    monitor = str(meta.get("monitor_name") or "") if isinstance(meta, dict) else ""
    # Records sampled without meta: OTLPMonitor's service name is `bento:monitor`.
    monitor = monitor or resource.get("service.name", "").rpartition(":")[2]
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    if len(data) > MAX_MONITOR_DATA_BYTES:
        body = {_META: {"monitor_name": monitor}, "error": f"record of {len(data)} characters left out: too large"}
        data = json.dumps(body)
    time_ns = record.time_unix_nano or record.observed_time_unix_nano or now_ns
    return MonitorEntry(
        organization=organization,
        monitor=_clean(monitor)[:_MAX_NAME],
        time_ns=min(time_ns, _MAX_TIME_NS),
        trace_id=_trace_of(record, body),
        data=data,
        deployment=resource.get(DEPLOYMENT, "")[:_MAX_NAME],
    )


def _record(body: AnyValue) -> dict[str, Any] | None:
    """What a monitor logged, a mapping of columns; None where the body is something else."""
    kind = body.WhichOneof("value")
    if kind == "kvlist_value":
        plain: dict[str, Any] = _plain(body)
        return plain
    text = body.string_value
    if kind != "string_value" or f"'{_META}': {{" not in text or len(text) > MAX_MONITOR_DATA_BYTES:
        return None
    # BentoML 1.0's SDK (1.18) sends the mapping as Python prints it.
    try:
        printed = ast.literal_eval(text)
        json.dumps(printed, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        # Something in it prints as no literal, an array of numpy's: its text is kept.
        named = _PRINTED_NAME.search(text)
        return {"record": text, _META: {"monitor_name": named[1] if named else ""}}
    return printed if isinstance(printed, dict) else None


def _trace_of(record: LogRecord, body: Mapping[str, Any]) -> str:
    """The trace of the request: the record's own, else the column `trace_id`, a decimal number."""
    if len(record.trace_id) == 16 and any(record.trace_id):
        return record.trace_id.hex()
    try:
        number = int(str(body.get(_TRACE, "")))
    except ValueError:
        return ""
    return f"{number:032x}" if 0 < number < 2**128 else ""


def _text(value: AnyValue) -> str:
    plain = _plain(value)
    if isinstance(plain, str):
        text = plain
    elif isinstance(plain, bool | None):
        text = "" if plain is None else str(plain).lower()
    else:
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    return _clean(text)[:MAX_ATTRIBUTE_CHARS]


def _plain(value: AnyValue, depth: int = 0) -> Any:
    kind = value.WhichOneof("value")
    if kind == "kvlist_value":
        if depth == _MAX_DEPTH:
            return "…"
        return {pair.key: _plain(pair.value, depth + 1) for pair in value.kvlist_value.values}
    if kind == "array_value":
        if depth == _MAX_DEPTH:
            return "…"
        return [_plain(item, depth + 1) for item in value.array_value.values]
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    if kind == "double_value" and (value.double_value != value.double_value or abs(value.double_value) == float("inf")):
        # JSON has no such numbers.
        return str(value.double_value)
    return getattr(value, kind) if kind else None


def _ids_to_base64(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: base64.b64encode(bytes.fromhex(value)).decode()
            if key in ("traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id")
            and isinstance(value, str)
            else _ids_to_base64(value)
            for key, value in node.items()
        }
    return [_ids_to_base64(item) for item in node] if isinstance(node, list) else node


def _clean(text: str) -> str:
    # PostgreSQL's text holds no NUL.
    return text.replace("\0", "\ufffd") if "\0" in text else text
