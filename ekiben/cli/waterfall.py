"""A trace as a waterfall: who called whom, when, and for how long. Pure; `traces.py` prints it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ekiben.recorder.v1 import recorder_pb2 as pb


@dataclass(frozen=True)
class Row:
    """One span, at its place in the tree."""

    tree: str
    """The branches before its name."""
    span: pb.Span
    start_ns: int
    """From the trace's begin, in nanoseconds."""
    duration_ns: int


def is_message(span: pb.Span) -> bool:
    """Whether a span is one message between a server and its application: BentoML's tracing makes one for each ASGI
    event, three for a plain request and one more for each chunk of a stream. They say nothing that their parent does
    not, unless they failed."""
    return "asgi.event.type" in span.attributes and not span.error


def without_messages(spans: Sequence[pb.Span]) -> list[pb.Span]:
    """The spans but those of single messages; one that has a span below it stays."""
    parents = {span.parent_span_id for span in spans}
    return [span for span in spans if span.span_id in parents or not is_message(span)]


def rows(spans: Sequence[pb.Span]) -> list[Row]:
    """The spans in the order of the tree, siblings by start time.

    A span whose parent is not among them (it was made elsewhere, or has not arrived) is a root. A loop of parents,
    which only a broken sender makes, is cut at its first span.
    """
    known = {span.span_id for span in spans}
    ordered = sorted(spans, key=lambda span: (span.start_time.ToNanoseconds(), -span.duration.ToNanoseconds()))
    children: dict[str, list[pb.Span]] = {}
    for span in ordered:
        parent = span.parent_span_id if span.parent_span_id in known and span.parent_span_id != span.span_id else ""
        children.setdefault(parent, []).append(span)
    begin = min((span.start_time.ToNanoseconds() for span in spans), default=0)
    drawn: list[Row] = []
    seen: set[str] = set()
    # A stack of (span, branches, twig, below), last one first: a chain of calls may be deeper than Python's own stack.
    # The roots come first, then what only a loop of parents holds.
    todo = [(span, "", "", "") for span in reversed([*children.get("", []), *ordered])]
    while todo:
        span, branches, twig, below = todo.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        start = span.start_time.ToNanoseconds() - begin
        drawn.append(Row(branches + twig, span, start, span.duration.ToNanoseconds()))
        under = children.get(span.span_id, [])
        for child in reversed(under):
            last = child is under[-1]
            todo.append((child, branches + below, "└─ " if last else "├─ ", "   " if last else "│  "))
    return drawn


_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(start_ns: int, duration_ns: int, total_ns: int, width: int) -> str:
    """A bar of `width` cells for the time from `start_ns`, at least one cell's eighth wide, exact to an eighth cell.

    The begin is rounded down to a whole cell, because terminals cannot draw a cell's right part alone.
    """
    if width <= 0:
        return ""
    total = max(total_ns, 1)
    first = min(start_ns * width // total, width - 1)
    end = min(max(-(-(start_ns + duration_ns) * width * 8 // total), first * 8 + 1), width * 8)
    whole, eighths = divmod(end - first * 8, 8)
    return " " * first + "█" * whole + (_EIGHTHS[eighths] if eighths else "")
