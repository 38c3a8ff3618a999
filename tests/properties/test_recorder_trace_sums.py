"""Whatever spans come, in whatever order and batches, the sums of a trace are those of all its spans."""

from hypothesis import given
from hypothesis import strategies as st

from services.recorder.domain import Span, TraceSummary, root_of, summarize
from tests.fixtures_recorder import span

_spans = st.lists(
    st.builds(
        span,
        st.integers(1, 12),
        st.integers(0, 14),
        start_ms=st.integers(0, 5),
        service=st.sampled_from(["gateway", "registry"]),
        error=st.booleans(),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda each: each.span_id,
)


def add(before: TraceSummary | None, kept: dict[str, Span], batch: list[Span]) -> TraceSummary:
    """What the store does with a batch."""
    summary, again = summarize(before, batch, set(kept))
    kept.update({each.span_id: each for each in batch})
    if not again:
        return summary
    root = root_of(kept.values())
    return TraceSummary(
        **{name: getattr(summary, name) for name in ("organization", "trace_id", "start_ns", "end_ns", "services")},
        span_count=summary.span_count,
        error_count=summary.error_count,
        root_span_id=root.span_id,
        root_parent_span_id=root.parent_span_id,
        root_start_ns=root.start_ns,
        root=root.display_name,
    )


@given(_spans, st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_sums_do_not_depend_on_batches(spans: list[Span], sizes: list[int]) -> None:
    kept: dict[str, Span] = {}
    summary = None
    rest = list(spans)
    for size in sizes:
        batch, rest = rest[:size], rest[size:]
        if batch:
            summary = add(summary, kept, batch)
    assert summary is not None
    assert not rest
    assert summary.span_count == len(spans)
    assert summary.error_count == sum(each.error for each in spans)
    assert summary.start_ns == min(each.start_ns for each in spans)
    assert summary.end_ns == max(each.end_ns for each in spans)
    assert summary.services == {each.service for each in spans}
    ids = {each.span_id for each in spans}
    roots = [each for each in spans if each.parent_span_id in ("", each.span_id) or each.parent_span_id not in ids]
    if roots:  # else every span is in or below a ring of parents, and any of them may stand in
        assert summary.root_span_id == min(roots, key=lambda each: (each.start_ns, each.span_id)).span_id
