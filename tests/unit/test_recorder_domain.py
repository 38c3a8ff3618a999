"""Filters, text of bodies, and the sums of a trace."""

import pytest

from ekiben.errors import InvalidArgument
from services.recorder.domain import StatusFilter, parse_trace_id, root_of, summarize, text_of
from tests.fixtures_recorder import span


@pytest.mark.parametrize(
    ("text", "inside", "outside"), [("200", 200, 201), ("5xx", 599, 600), ("5XX", 500, 499), ("0", 0, 200)]
)
def test_a_status_filter_is_a_status_or_a_class(text: str, inside: int, outside: int) -> None:
    wanted = StatusFilter.parse(text)
    assert wanted is not None
    assert inside in wanted
    assert outside not in wanted


@pytest.mark.parametrize("text", ["20", "2x", "xxx", "6xx", "0xx", "200,500", "-1", "2xxx", "٢٠٠"])
def test_another_status_filter_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        StatusFilter.parse(text)
    assert refused.value.reason == "STATUS_INVALID"


def test_no_status_filter_means_all() -> None:
    assert StatusFilter.parse("") is None


@pytest.mark.parametrize("text", ["", "0" * 32, "a" * 31, "g" * 32, "a" * 33])
def test_a_trace_id_is_32_hex_digits_not_all_zero(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_trace_id(text)


def test_a_trace_id_may_be_in_upper_case() -> None:
    assert parse_trace_id("AB" * 16) == "ab" * 16


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        ("application/json", b'{"a":1}', '{"a":1}'),
        ("application/problem+json; charset=utf-8", "é".encode(), "é"),
        ("TEXT/plain", b"x", "x"),
        ("text/event-stream", b"data: 1\n\n", "data: 1\n\n"),
        ("text/plain; charset=latin-1", b"x", ""),
        ("application/json", b"\xff\xfe", ""),
        ("application/json", b"a\0b", ""),
        ("image/png", b"abc", ""),
        ("", b"abc", ""),
    ],
)
def test_text_is_there_for_text_that_is_utf_8(content_type: str, body: bytes, text: str) -> None:
    assert text_of(content_type, body) == text


def test_a_body_cut_inside_a_character_is_text_up_to_it() -> None:
    body = "ab駅".encode()
    for cut in (1, 2):
        assert text_of("text/plain", body[:-cut], truncated=True) == "ab"
        assert text_of("text/plain", body[:-cut]) == ""


def test_spans_that_name_one_another_as_parent_have_the_earliest_as_root() -> None:
    ring = [span(2, 3), span(1, 2), span(3, 1)]
    summary, _ = summarize(None, ring, ())
    assert summary.root == root_of(ring).display_name == "span 1"
    # It only stands in: where a root comes later, the root must be looked for again, however late that began.
    root = span(9, 0, start_ms=5)
    assert summarize(summary, [root], ())[1]
    assert root_of([*ring, root]).display_name == "span 9"


def test_a_span_that_is_its_own_parent_is_a_root() -> None:
    assert summarize(None, [span(1, 1)], ())[0].root == "span 1"


def test_a_summary_says_when_its_root_has_got_a_parent() -> None:
    summary, again = summarize(None, [span(5, 4)], ())
    assert (summary.root, again) == ("span 5", False)
    _, again = summarize(summary, [span(4)], ())
    assert again
