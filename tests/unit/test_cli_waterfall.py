"""A trace as a waterfall."""

import click

from ekiben.cli import output, traces, waterfall
from ekiben.recorder.v1 import recorder_pb2 as pb


def span(
    id_: str, parent: str, start_ms: float, duration_ms: float, service: str = "gateway", **more: object
) -> pb.Span:
    found = pb.Span(span_id=id_, parent_span_id=parent, service=service, display_name=f"span {id_}")
    found.start_time.FromNanoseconds(1_700_000_000_000_000_000 + int(start_ms * 1e6))
    found.duration.FromNanoseconds(int(duration_ms * 1e6))
    for key, value in more.items():
        setattr(found, key, value)
    return found


def test_rows_follow_the_tree_and_siblings_the_clock() -> None:
    spans = [span("d", "b", 6, 2), span("c", "a", 5, 1), span("a", "gone", 0, 10), span("b", "a", 1, 8)]
    assert [(row.tree, row.span.span_id) for row in waterfall.rows(spans)] == [
        ("", "a"),
        ("├─ ", "b"),
        ("│  └─ ", "d"),
        ("└─ ", "c"),
    ]


def test_a_loop_of_parents_and_a_span_of_itself_are_drawn_once() -> None:
    spans = [span("a", "b", 0, 1), span("b", "a", 1, 1), span("c", "c", 2, 1)]
    assert sorted(row.span.span_id for row in waterfall.rows(spans)) == ["a", "b", "c"]
    assert waterfall.rows([]) == []


def test_bars_lie_where_the_time_was() -> None:
    assert waterfall.bar(0, 100, 100, 10) == "█" * 10
    assert waterfall.bar(50, 50, 100, 10) == "     █████"
    assert waterfall.bar(0, 1, 1_000_000, 10) == "▏"
    assert waterfall.bar(1_000_000, 0, 1_000_000, 10) == " " * 9 + "█"
    assert waterfall.bar(0, 0, 0, 10) == "▏"
    assert waterfall.bar(0, 10, 10, 0) == ""


def test_lines_fit_the_width_and_say_what_failed() -> None:
    trace = [
        span("a", "", 0, 20, display_name="POST /summarize " + "x" * 80),
        span("b", "a", 5, 10, "Summarizer", error=True, status_message="ValueError: no"),
    ]
    for width in (60, 80, 120, 200):
        lines = [click.unstyle(line) for line in traces.draw(trace, width)]
        assert max(len(line) for line in lines) <= width, (width, lines)
    assert "…" in lines[0] and "20.0 ms" in lines[0]
    assert "✗ span b" in lines[1] and "Summarizer" in lines[1]
    assert "ValueError: no" in lines[2]


def message(id_: str, parent: str, **more: object) -> pb.Span:
    found = span(id_, parent, 1, 1, "Summarizer", **more)
    found.attributes["asgi.event.type"] = "http.response.body"
    return found


def test_spans_of_single_messages_are_left_out_unless_they_failed_or_hold_others() -> None:
    spans = [
        span("a", "", 0, 20, "Summarizer"),
        *(message(f"m{number}", "a") for number in range(60)),
        message("failed", "a", error=True),
        message("parent", "a"),
        span("b", "parent", 5, 10),
    ]
    assert [each.span_id for each in waterfall.without_messages(spans)] == ["a", "failed", "parent", "b"]


def test_a_chain_of_calls_may_be_deeper_than_pythons_stack() -> None:
    spans = [span(str(depth), str(depth - 1), depth, 1) for depth in range(5000)]
    assert [row.span.span_id for row in waterfall.rows(spans)] == [str(depth) for depth in range(5000)]


def test_a_name_that_a_caller_chose_neither_breaks_the_line_nor_steers_the_terminal() -> None:
    name = "GET /\x1b[2J\nforged  \u202e日本\u3000語\x9b"
    (line,) = traces.draw([span("a", "", 0, 20, display_name=name)], 120)
    assert r"GET /\x1b[2J\nforged  \u202e日本" in line and "\x1b[2J" not in line and "\n" not in line
    assert "日本\u3000語\\x9b" in line
    assert output.visible("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
