"""The recorder's messages, to and from domain objects."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben import names
from ekiben.errors import InvalidArgument
from ekiben.recorder.v1 import recorder_pb2 as pb
from services.recorder import domain

# Columns hold at most this; what Envoy or a caller made longer is cut, since a capture is worth more than its tail.
_MAX_SHORT = 255
_MAX_PATH = 8192
_MAX_BIGINT = 2**63 - 1
# Text repeats the body; two long ones of a prediction, twice, would not fit into a message.
_MAX_TEXT_BYTES = 2 << 20
# Characters of a trace's attributes; 10,000 spans without any are about 3 MiB.
_MAX_ATTRIBUTES_BYTES = 8 << 20


def prediction_to_proto(prediction: domain.Prediction, *, bodies: bool) -> pb.Prediction:
    """A prediction; without `bodies` the payloads have neither headers, body nor text."""
    message = pb.Prediction(
        name=f"predictions/{prediction.id}",
        deployment=prediction.deployment,
        revision=prediction.revision,
        target=prediction.target,
        bento=prediction.bento,
        models=prediction.models,
        replica=prediction.replica,
        api_token=prediction.api_token,
        start_time=timestamp(prediction.start_time_us * 1000),
        latency=duration(prediction.latency_us * 1000),
        method=prediction.method,
        path=prediction.path,
        protocol=prediction.protocol,
        status=prediction.status,
        response_flags=prediction.response_flags,
        trace_id=prediction.trace_id,
        request=payload_to_proto(prediction.request, bodies=bodies),
        response=payload_to_proto(prediction.response, bodies=bodies),
        peer=prediction.peer,
        organization=f"organizations/{prediction.organization}",
    )
    if prediction.first_byte_us is not None:
        message.time_to_first_byte.CopyFrom(duration(prediction.first_byte_us * 1000))
    message.monitor_entries.extend(map(monitor_entry_to_proto, prediction.monitor_entries))
    return message


def prediction_from_proto(message: pb.Prediction, *, organization: str, index: int) -> domain.Prediction:
    """A captured prediction. A trace id that is none is left out: the prediction is worth keeping without it.

    Raises:
        InvalidArgument: `predictions[index]` has no valid name, deployment or start time, or an impossible status.
    """
    where = f"predictions[{index}]"
    try:
        id_ = names.Prediction.parse(message.name).prediction
        deployment = str(names.Deployment.parse(message.deployment))
    except InvalidArgument as exc:
        violations = [(f"{where}.{name}", why) for name, why in exc.violations]
        error = InvalidArgument(f"{where}: {exc.message}", reason=exc.reason, violations=violations)
        error.metadata = exc.metadata
        raise error from exc
    if not 0 <= message.status <= 999:
        raise _wrong(f"{where}.status", "An HTTP status, or 0.")
    if not message.HasField("start_time"):
        raise _wrong(f"{where}.start_time", "Required.")
    return domain.Prediction(
        id=id_,
        organization=organization_of(message.organization) or organization,
        deployment=deployment,
        start_time_us=microseconds(message.start_time),
        latency_us=_microseconds_of(message.latency),
        status=message.status,
        trace_id=_trace_id(message.trace_id),
        revision=_short(message.revision),
        target=_short(message.target),
        bento=_short(message.bento),
        models=tuple(_short(model) for model in message.models),
        replica=_short(message.replica),
        api_token=_short(message.api_token),
        method=_short(message.method),
        path=_clean(message.path)[:_MAX_PATH],
        protocol=_short(message.protocol)[:63],
        response_flags=_short(message.response_flags),
        peer=_short(message.peer),
        first_byte_us=(
            _microseconds_of(message.time_to_first_byte) if message.HasField("time_to_first_byte") else None
        ),
        request=_payload_from_proto(message.request),
        response=_payload_from_proto(message.response),
    )


def payload_to_proto(payload: domain.Payload, *, bodies: bool) -> pb.Payload:
    """One direction; `text` is filled where the body is text of at most 2 MiB."""
    message = pb.Payload(
        body_size_bytes=payload.body_size_bytes, truncated=payload.truncated, content_type=payload.content_type
    )
    if bodies:
        message.headers.update(payload.headers)
        message.body = payload.body
        if len(payload.body) <= _MAX_TEXT_BYTES:
            message.text = payload.text
    return message


def monitor_entry_to_proto(entry: domain.MonitorEntry) -> pb.MonitorEntry:
    """One monitor entry."""
    return pb.MonitorEntry(
        monitor=entry.monitor,
        time=timestamp(entry.time_ns),
        trace_id=entry.trace_id,
        data=entry.data,
        deployment=entry.deployment,
        organization=f"organizations/{entry.organization}",
    )


def trace_to_proto(summary: domain.TraceSummary, spans: Iterable[domain.Span] = ()) -> pb.Trace:
    """A trace with these spans. Attributes of those beyond about 8 MiB are left out, so that it fits into a message."""
    room = _MAX_ATTRIBUTES_BYTES
    shown = []
    for span in spans:
        room -= sum(len(key) + len(value) for key, value in span.attributes.items())
        shown.append(span_to_proto(span, attributes=room >= 0))
    return pb.Trace(
        name=f"traces/{summary.trace_id}",
        start_time=timestamp(summary.start_ns),
        duration=duration(summary.end_ns - summary.start_ns),
        root=summary.root,
        span_count=summary.span_count,
        error_count=summary.error_count,
        spans=shown,
        services=sorted(summary.services),
    )


def span_to_proto(span: domain.Span, *, attributes: bool = True) -> pb.Span:
    """One span; without `attributes` it says so in one."""
    return pb.Span(
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        service=span.service,
        display_name=span.display_name,
        kind=span.kind,
        start_time=timestamp(span.start_ns),
        duration=duration(span.end_ns - span.start_ns),
        error=span.error,
        status_message=span.status_message if attributes else span.status_message[:_MAX_SHORT],
        attributes=span.attributes if attributes else {"ekiben.attributes_left_out": "true"},
    )


def prediction_filter(
    request: pb.ListPredictionsRequest | pb.TailPredictionsRequest, organization: str
) -> domain.PredictionFilter:
    """Which predictions a request asks for. A tail knows neither time nor trace.

    Raises:
        InvalidArgument: a filter that no prediction could match (NAME_INVALID, STATUS_INVALID, TRACE_ID_INVALID).
    """
    deployment = str(names.Deployment.parse(request.deployment)) if request.deployment else ""
    status = domain.StatusFilter.parse(request.status)
    if isinstance(request, pb.TailPredictionsRequest):
        return domain.PredictionFilter(organization, deployment, status=status)
    revision = ""
    if request.revision:
        parsed = names.Revision.parse(request.revision)
        revision, parent = str(parsed), str(parsed.parent)
        if deployment not in ("", parent):
            raise InvalidArgument(
                f"{revision} is no revision of {deployment}. Give one of the two.",
                reason="REVISION_OF_ANOTHER",
                violations=[("revision", f"must be a revision of {deployment}")],
            )
        deployment = parent
    return domain.PredictionFilter(
        organization,
        deployment,
        trace_id=domain.parse_trace_id(request.trace_id) if request.trace_id else "",
        status=status,
        start_time_us=microseconds(request.start_time) if request.HasField("start_time") else None,
        end_time_us=microseconds(request.end_time) if request.HasField("end_time") else None,
        revision=revision,
    )


def trace_filter(request: pb.ListTracesRequest, organization: str) -> domain.TraceFilter:
    """Which traces a request asks for."""
    start_ns = None
    if request.HasField("start_time"):
        start_ns = _clamp(request.start_time.seconds * 1_000_000_000 + request.start_time.nanos)
    return domain.TraceFilter(organization, start_ns, _clean(request.service), request.errors_only)


def organization_of(name: str) -> str:
    """The id in `organizations/{organization}`; empty for the empty name.

    Raises:
        InvalidArgument: another form (NAME_INVALID).
    """
    return names.Organization.parse(name).organization if name else ""


def timestamp(time_ns: int) -> Timestamp:
    """Nanoseconds since the epoch as a timestamp."""
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)


def duration(length_ns: int) -> Duration:
    """Nanoseconds, not negative, as a duration."""
    return Duration(seconds=length_ns // 1_000_000_000, nanos=length_ns % 1_000_000_000)


def microseconds(time: Timestamp) -> int:
    """A timestamp as microseconds since the epoch; a part of one is cut off."""
    return _clamp(time.seconds * 1_000_000 + time.nanos // 1000)


def _microseconds_of(length: Duration) -> int:
    return max(0, length.seconds * 1_000_000 + length.nanos // 1000)


def _payload_from_proto(message: pb.Payload) -> domain.Payload:
    return domain.Payload(
        headers=dict(message.headers),
        body=message.body,
        body_size_bytes=max(message.body_size_bytes, len(message.body)),
        truncated=message.truncated or message.body_size_bytes > len(message.body),
        content_type=_short(message.content_type),
    )


def _trace_id(text: str) -> str:
    try:
        return domain.parse_trace_id(text) if text else ""
    except InvalidArgument:
        return ""


def _short(text: str) -> str:
    return _clean(text)[:_MAX_SHORT]


def _clean(text: str) -> str:
    # PostgreSQL's text holds no NUL.
    return text.replace("\0", "\ufffd") if "\0" in text else text


def _clamp(number: int) -> int:
    # A timestamp reaches the year 9999, a column of nanoseconds the year 2262.
    return max(-_MAX_BIGINT, min(number, _MAX_BIGINT))


def _wrong(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field} is wrong. {description}", reason="FIELD_INVALID", violations=[(field, description)], field=field
    )
