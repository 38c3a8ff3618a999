"""Predictions, monitor entries and spans; what their filters mean; how a trace is summed up. Pure.

Times are integers since the epoch, in the unit that the name says: predictions come from Envoy with microseconds,
spans from OpenTelemetry with nanoseconds, and neither fits a `datetime` without loss or cost.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ekiben.errors import InvalidArgument

# OpenTelemetry's own default is no limit; a stack trace fits, a whole request body does not belong into a span.
MAX_ATTRIBUTE_CHARS = 4096
MAX_ATTRIBUTES = 128
# More spans than this make a waterfall nobody can read, and a loop gone wild would fill the disk.
MAX_SPANS_PER_TRACE = 10_000
MAX_MONITOR_DATA_BYTES = 256 << 10

_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_STATUS = re.compile(r"0|[1-5][0-9]{2}|[1-5]xx")
_CHARSET = re.compile(r"charset\s*=\s*\"?([A-Za-z0-9._-]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Payload:
    """One direction of a prediction. `body` holds its first bytes as they passed; `body_size_bytes` is the whole."""

    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    body_size_bytes: int = 0
    truncated: bool = False
    content_type: str = ""

    @property
    def text(self) -> str:
        """The body as text where it is JSON or text, and UTF-8 up to where it was cut; else empty."""
        return text_of(self.content_type, self.body, truncated=self.truncated)


@dataclass(frozen=True, slots=True)
class MonitorEntry:
    """One record of `bentoml.monitor()`. `data` is JSON text of an object; `trace_id` is empty where none was known."""

    organization: str
    monitor: str
    time_ns: int
    trace_id: str
    data: str
    deployment: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One captured request with its response. `id` is the gateway's request id; resource names are kept as text.

    `first_byte_us`: from the request's first byte to the response's first; None where there was no response.
    """

    id: str
    organization: str
    deployment: str
    start_time_us: int
    latency_us: int
    status: int
    trace_id: str = ""
    revision: str = ""
    target: str = ""
    bento: str = ""
    models: Sequence[str] = ()
    replica: str = ""
    api_token: str = ""
    method: str = ""
    path: str = ""
    protocol: str = ""
    response_flags: str = ""
    peer: str = ""
    request: Payload = field(default_factory=Payload)
    response: Payload = field(default_factory=Payload)
    first_byte_us: int | None = None
    monitor_entries: Sequence[MonitorEntry] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """One step of a trace. `parent_span_id` is empty for a root; `attributes` hold text only, cut to the limits."""

    organization: str
    trace_id: str
    span_id: str
    parent_span_id: str
    service: str
    display_name: str
    kind: str
    start_ns: int
    end_ns: int
    error: bool = False
    status_message: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


class Step(NamedTuple):
    """What of a span its place in the trace depends on."""

    span_id: str
    parent_span_id: str
    start_ns: int
    display_name: str


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a list says of a trace. It is the sum of the spans that are there, in whatever order they came."""

    organization: str
    trace_id: str
    start_ns: int
    end_ns: int
    span_count: int
    error_count: int
    root_span_id: str
    root_parent_span_id: str
    root_start_ns: int
    root: str
    services: frozenset[str] = frozenset()

    def with_root(self, root: "Span | Step") -> "TraceSummary":
        """The same with another root."""
        return replace(
            self,
            root_span_id=root.span_id,
            root_parent_span_id=root.parent_span_id,
            root_start_ns=root.start_ns,
            root=root.display_name,
        )


@dataclass(frozen=True, slots=True)
class StatusFilter:
    """The HTTP statuses from `lowest` to `highest`, both included."""

    lowest: int
    highest: int

    @classmethod
    def parse(cls, text: str) -> "StatusFilter | None":
        """`200`, `0` (the caller left before a status was sent) or a class, `5xx`; None for the empty text.

        Raises:
            InvalidArgument: anything else (STATUS_INVALID).
        """
        wanted = text.strip().lower()
        if not wanted:
            return None
        if not _STATUS.fullmatch(wanted):
            raise InvalidArgument(
                f"Status {text!r} is neither an HTTP status nor a class of them; write `200` or `5xx`.",
                reason="STATUS_INVALID",
                status=text,
                violations=[("status", "An HTTP status (`200`) or a class (`5xx`).")],
            )
        if wanted.endswith("xx"):
            return cls(int(wanted[0]) * 100, int(wanted[0]) * 100 + 99)
        return cls(int(wanted), int(wanted))

    def __contains__(self, status: int) -> bool:
        return self.lowest <= status <= self.highest


@dataclass(frozen=True, slots=True)
class PredictionFilter:
    """Which predictions a list or a tail gives. Empty and None mean all; `start_time_us` is included, the end not."""

    organization: str
    deployment: str = ""
    trace_id: str = ""
    status: StatusFilter | None = None
    start_time_us: int | None = None
    end_time_us: int | None = None
    revision: str = ""


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces a list gives. Empty and None mean all."""

    organization: str
    start_ns: int | None = None
    service: str = ""
    errors_only: bool = False


def parse_trace_id(text: str, *, field_name: str = "trace_id") -> str:
    """A trace id in lower case.

    Raises:
        InvalidArgument: not 32 hex digits, or all zeros, which W3C and OpenTelemetry call invalid (TRACE_ID_INVALID).
    """
    wanted = text.strip().lower()
    if not _TRACE_ID.fullmatch(wanted) or not wanted.strip("0"):
        raise InvalidArgument(
            f"Trace id {text!r} is not one; write 32 hex digits, not all of them zero.",
            reason="TRACE_ID_INVALID",
            trace_id=text,
            violations=[(field_name, "32 hex digits, not all zero.")],
        )
    return wanted


def text_of(content_type: str, body: bytes, *, truncated: bool = False) -> str:
    """`body` as text, or empty where the media type is not text or the bytes are not UTF-8.

    A truncated body may end inside a character: up to three trailing bytes are left out then.
    NUL is not text: PostgreSQL and terminals agree.
    """
    media, _, parameters = content_type.partition(";")
    media = media.strip().lower()
    if not (
        media.startswith("text/")
        or media.endswith(("+json", "+xml", "/json", "/xml"))
        or media in ("application/x-ndjson", "application/jsonl", "application/javascript", "application/yaml")
        or media == "application/x-www-form-urlencoded"
    ):
        return ""
    charset = _CHARSET.search(parameters)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
        return ""
    for cut in range(4 if truncated else 1):
        try:
            text = body[: len(body) - cut].decode()
        except UnicodeDecodeError:
            continue
        return "" if "\0" in text else text
    return ""


def summarize(before: TraceSummary | None, new: Sequence[Span], present: Collection[str]) -> tuple[TraceSummary, bool]:
    """The summary of a trace after `new` spans came, and whether its root must be looked for again.

    `new` are spans of one trace that were not there before; `present` are those of the new spans' parents that the
    store held before. The root is the earliest span whose parent is not there. True in the answer means that the root
    so far has got its parent, or only stood in: then any span may be the root, and `root_of` of all the trace's spans
    decides.
    """
    ids = {span.span_id for span in new}
    best = None
    if before is not None:
        best = (before.root_start_ns, before.root_span_id, before.root_parent_span_id, before.root)
    for span in new:
        if _is_root(span, ids, present):
            candidate = (span.start_ns, span.span_id, span.parent_span_id, span.display_name)
            best = candidate if best is None else min(best, candidate)
    # Spans that name one another as parent, in a ring, have no root; the earliest stands in, as a parent of its own.
    if best is None:
        first = min(new, key=lambda span: (span.start_ns, span.span_id))
        best = (first.start_ns, first.span_id, first.span_id, first.display_name)
    first_span = new[0]
    return (
        TraceSummary(
            organization=first_span.organization,
            trace_id=first_span.trace_id,
            start_ns=min([span.start_ns for span in new] + ([before.start_ns] if before else [])),
            end_ns=max([span.end_ns for span in new] + ([before.end_ns] if before else [])),
            span_count=len(new) + (before.span_count if before else 0),
            error_count=sum(span.error for span in new) + (before.error_count if before else 0),
            root_start_ns=best[0],
            root_span_id=best[1],
            root_parent_span_id=best[2],
            root=best[3],
            services=frozenset(span.service for span in new) | (before.services if before else frozenset()),
        ),
        before is not None and before.root_parent_span_id in ids | {before.root_span_id},
    )


def root_of(spans: Iterable[Span | Step]) -> Span | Step:
    """The earliest span whose parent is not among `spans`; in a ring of parents the earliest of all, as its own parent.

    `spans` is not empty.
    """
    every = list(spans)
    ids = {span.span_id for span in every}
    roots = [span for span in every if _is_root(span, ids, ())]
    first = min(roots or every, key=lambda span: (span.start_ns, span.span_id))
    if roots:
        return first
    if isinstance(first, Step):
        return first._replace(parent_span_id=first.span_id)
    return replace(first, parent_span_id=first.span_id)


def asker_of(entry: MonitorEntry, spans: Mapping[str, tuple[str, str]], predictions: Collection[str]) -> str:
    """Which of the `predictions` of a trace the entry was logged for; empty where the spans do not tell.

    `spans`: for each the parent and, of the gateway's, the request id. BentoML writes the span of the request, as a
    decimal number, into the column `request_id`.
    """
    try:
        span_id = f"{int(json.loads(entry.data)['request_id']):016x}"
    except (ValueError, TypeError, KeyError):
        return ""
    for _ in range(len(spans)):  # Spans may name one another as parent, in a ring.
        span_id, request_id = spans.get(span_id, ("", ""))
        if request_id in predictions:
            return request_id
        if not span_id:
            break
    return ""


def _is_root(span: Span | Step, new: Collection[str], present: Collection[str]) -> bool:
    parent = span.parent_span_id
    return not parent or parent == span.span_id or (parent not in new and parent not in present)
