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

    def draw(span: pb.Span, branches: str, twig: str, below: str) -> None:
        if span.span_id in seen:
            return
        seen.add(span.span_id)
        start = span.start_time.ToNanoseconds() - begin
        drawn.append(Row(branches + twig, span, start, span.duration.ToNanoseconds()))
        under = children.get(span.span_id, [])
        for index, child in enumerate(under):
            end = index == len(under) - 1
            draw(child, branches + below, "└─ " if end else "├─ ", "   " if end else "│  ")

    for span in children.get("", []):
        draw(span, "", "", "")
    for span in ordered:  # what only a loop of parents holds
        draw(span, "", "", "")
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
