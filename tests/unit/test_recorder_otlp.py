"""OTLP's messages become spans and monitor entries, whatever is in them."""

import json
import math

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from ekiben.channel import MAX_MESSAGE_BYTES
from services.recorder import domain, messages, otlp

TRACE, SPAN = bytes(range(16)), bytes(range(1, 9))


def pair(key: str, **value: object) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(**value))  # type: ignore[arg-type]


def export(*spans: OtlpSpan, resource: list[KeyValue] | None = None) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.extend(resource or [pair("service.name", string_value="gateway")])
    group.scope_spans.add().spans.extend(spans)
    return request


def only(request: ExportTraceServiceRequest) -> domain.Span:
    (span,), refused = otlp.spans_of(request, organization="default")
    assert refused == 0
    return span


def test_a_span_keeps_what_a_waterfall_shows() -> None:
    span = OtlpSpan(
        trace_id=TRACE,
        span_id=SPAN,
        parent_span_id=b"\1" * 8,
        name="GET /",
        kind=OtlpSpan.SPAN_KIND_CLIENT,
        start_time_unix_nano=5,
        end_time_unix_nano=9,
        status=Status(code=Status.STATUS_CODE_ERROR, message="no"),
        attributes=[pair("n", int_value=7), pair("on", bool_value=True), pair("f", double_value=0.5)],
    )
    span.events.add(name="exception").attributes.append(pair("exception.message", string_value="boom"))
    resource = [
        pair("service.name", string_value="gateway"),
        pair("ekiben.deployment", string_value="deployments/iris"),
    ]
    assert only(export(span, resource=resource)) == domain.Span(
        "default",
        TRACE.hex(),
        SPAN.hex(),
        "01" * 8,
        "gateway",
        "GET /",
        "CLIENT",
        5,
        9,
        error=True,
        status_message="no",
        attributes={
            "n": "7",
            "on": "true",
            "f": "0.5",
            "ekiben.deployment": "deployments/iris",
            "exception.message": "boom",
        },
    )


def test_the_component_of_a_span_goes_before_the_service_of_its_process() -> None:
    span = OtlpSpan(trace_id=TRACE, span_id=SPAN, attributes=[pair("ekiben.component", string_value="registry")])
    assert only(export(span)).service == "registry"


def test_a_sender_does_not_choose_its_organization() -> None:
    resource = [pair("ekiben.organization", string_value="another")]
    assert only(export(OtlpSpan(trace_id=TRACE, span_id=SPAN), resource=resource)).organization == "default"


@pytest.mark.parametrize(
    ("trace_id", "span_id"), [(b"", SPAN), (TRACE, b""), (b"\0" * 16, SPAN), (TRACE, b"\0" * 8), (TRACE + b"1", SPAN)]
)
def test_spans_without_valid_ids_are_refused(trace_id: bytes, span_id: bytes) -> None:
    good = OtlpSpan(trace_id=TRACE, span_id=SPAN)
    spans, refused = otlp.spans_of(export(OtlpSpan(trace_id=trace_id, span_id=span_id), good), organization="default")
    assert (len(spans), refused) == (1, 1)


def test_odd_spans_are_taken_within_limits() -> None:
    span = only(
        export(
            OtlpSpan(
                trace_id=TRACE,
                span_id=SPAN,
                parent_span_id=b"short",
                name="a\0b" * 10_000,
                start_time_unix_nano=2**64 - 1,
                end_time_unix_nano=1,
                attributes=[pair(f"k{n}", string_value="x" * 100_000) for n in range(1000)],
            )
        )
    )
    assert span.parent_span_id == ""
    assert "\0" not in span.display_name
    assert len(span.display_name) == 255
    assert span.start_ns == span.end_ns == 2**63 - 1
    assert len(span.attributes) == domain.MAX_ATTRIBUTES
    assert {len(value) for value in span.attributes.values()} == {domain.MAX_ATTRIBUTE_CHARS}


def test_attributes_become_text() -> None:
    nested = AnyValue()
    for value in (AnyValue(int_value=1), AnyValue(string_value="é"), AnyValue(double_value=math.inf), AnyValue()):
        nested.array_value.values.append(value)
    attributes = otlp.attributes_of(
        [KeyValue(key="list", value=nested), pair("bytes", bytes_value=b"\xff"), KeyValue(key="none")]
    )
    assert attributes == {"list": '[1,"é","inf",null]', "bytes": "/w==", "none": ""}


def test_deep_values_are_cut() -> None:
    value = AnyValue(string_value="deep")
    for _ in range(50):
        outer = AnyValue()
        outer.array_value.values.append(value)
        value = outer
    assert "…" in otlp.attributes_of([KeyValue(key="k", value=value)])["k"]


def monitor_record(*, trace_id: bytes = TRACE, meta: bool = True, column: str = "") -> ExportLogsServiceRequest:
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add()
    group.resource.attributes.extend(
        [pair("service.name", string_value="Iris:other"), pair("ekiben.deployment", string_value="deployments/iris")]
    )
    logs = group.scope_logs.add()
    logs.scope.name = "bentoml_monitor_data"
    record = logs.log_records.add(time_unix_nano=77, trace_id=trace_id)
    values = record.body.kvlist_value.values
    values.append(pair("x", double_value=2.5))
    values.append(pair("nan", double_value=math.nan))
    if column:
        values.append(pair("trace_id", string_value=column))
    if meta:
        bento = AnyValue()
        bento.kvlist_value.values.append(pair("monitor_name", string_value="iris_prediction"))
        values.append(KeyValue(key="bento_meta", value=bento))
    return request


def test_a_record_of_bentoml_monitor_becomes_an_entry() -> None:
    (entry,), others = otlp.monitor_entries_of(monitor_record(), organization="default", now_ns=1)
    assert others == 0
    assert (entry.monitor, entry.time_ns, entry.trace_id) == ("iris_prediction", 77, TRACE.hex())
    assert entry.deployment == "deployments/iris"
    assert json.loads(entry.data) == {"x": 2.5, "nan": "nan", "bento_meta": {"monitor_name": "iris_prediction"}}


def test_the_trace_of_a_record_may_be_a_decimal_column() -> None:
    request = monitor_record(trace_id=b"", column=str(int.from_bytes(TRACE)), meta=False)
    (entry,), _ = otlp.monitor_entries_of(request, organization="default", now_ns=1)
    assert (entry.trace_id, entry.monitor) == (TRACE.hex(), "other")
    for bad in ("0", "None", "9" * 60, "-5"):
        request = monitor_record(trace_id=b"", column=bad)
        assert otlp.monitor_entries_of(request, organization="default", now_ns=1)[0][0].trace_id == ""


@pytest.mark.parametrize(
    ("printed", "data"),
    [
        (
            "{'x': 2.5, 'bento_meta': {'monitor_name': 'iris'}}",
            {"x": 2.5, "bento_meta": {"monitor_name": "iris"}},
        ),
        (
            "{'x': array([1.]), 'bento_meta': {'monitor_name': 'iris'}}",
            {
                "record": "{'x': array([1.]), 'bento_meta': {'monitor_name': 'iris'}}",
                "bento_meta": {"monitor_name": "iris"},
            },
        ),
    ],
)
def test_a_record_of_an_old_sdk_comes_as_python_prints_it(printed: str, data: object) -> None:
    request = monitor_record()
    logs = request.resource_logs[0].scope_logs[0]
    logs.scope.name = "opentelemetry.sdk._logs._internal"
    logs.log_records[0].body.string_value = printed
    (entry,), _ = otlp.monitor_entries_of(request, organization="default", now_ns=1)
    assert (entry.monitor, entry.trace_id, json.loads(entry.data)) == ("iris", TRACE.hex(), data)


@pytest.mark.parametrize(
    "text", ["{'bento_meta': {" * 5000, "{1: 'bento_meta': {", "['bento_meta': {", "{('bento_meta': {"]
)
def test_text_that_only_looks_like_a_record_does_no_harm(text: str) -> None:
    request = monitor_record()
    request.resource_logs[0].scope_logs[0].log_records[0].body.string_value = text
    entries, others = otlp.monitor_entries_of(request, organization="default", now_ns=1)
    assert len(entries) + others == 1


def test_other_log_records_are_passed_over() -> None:
    request = monitor_record()
    logs = request.resource_logs[0].scope_logs[0]
    logs.scope.name = "app"
    logs.log_records.add().body.string_value = "hello"
    del logs.log_records[0]
    assert otlp.monitor_entries_of(request, organization="default", now_ns=1) == ([], 1)


def test_otlp_json_has_its_ids_in_hex() -> None:
    request = export(OtlpSpan(trace_id=TRACE, span_id=SPAN, parent_span_id=b"\1" * 8, name="x"))
    document = json.loads(json_format.MessageToJson(request))
    span = document["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span |= {"traceId": TRACE.hex(), "spanId": SPAN.hex(), "parentSpanId": "01" * 8, "unknownField": 1}
    parsed = ExportTraceServiceRequest()
    otlp.parse_json(json.dumps(document).encode(), parsed)
    assert parsed == request


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"resourceSpans": 1}', b"[" * 100_000, b'{"traceId": "zz"}', b"\xff"]
)
def test_bad_otlp_json_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        otlp.parse_json(body, ExportTraceServiceRequest())


def test_the_largest_trace_fits_into_a_message() -> None:
    one = only(
        export(
            OtlpSpan(
                trace_id=TRACE,
                span_id=SPAN,
                name="é" * 300,
                status=Status(code=Status.STATUS_CODE_ERROR, message="x" * 9000),
                attributes=[pair(f"k{n}", string_value="x" * 9000) for n in range(200)],
            )
        )
    )
    summary, _ = domain.summarize(None, [one], ())
    trace = messages.trace_to_proto(summary, [one] * domain.MAX_SPANS_PER_TRACE)
    assert trace.ByteSize() < MAX_MESSAGE_BYTES
    assert len(trace.spans[0].attributes) == domain.MAX_ATTRIBUTES
    assert dict(trace.spans[-1].attributes) == {"ekiben.attributes_left_out": "true"}
