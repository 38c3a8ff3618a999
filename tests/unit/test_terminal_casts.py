"""Recordings of terminals as asciicasts."""

import json

from services.deployer.casts import Cast


def test_a_character_that_comes_in_two_pieces_is_one() -> None:
    cast, text = Cast(), "駅弁".encode()
    lines = [cast.output(0.5, text[:4]), cast.output(1.25, text[4:])]
    assert [json.loads(line) for line in lines] == [[0.5, "o", "駅"], [1.25, "o", "弁"]]
    assert cast.output(2, b"\xe9") == ""  # Not yet a character.


def test_each_line_is_an_event_whatever_is_in_it() -> None:
    cast = Cast()
    header = json.loads(Cast.header(("sh", "-c", "ls"), "demo", 1700000000, 0, 0))
    assert (header["version"], header["width"], header["height"]) == (2, 80, 24)
    text = cast.output(0, b"a\r\nb\x1b[0m\x00") + cast.input(1, b"x") + cast.resize(2, 100, 50) + cast.marker(3, "end")
    events = [json.loads(line) for line in text.splitlines()]
    assert events == [[0, "o", "a\r\nb\x1b[0m\x00"], [1, "i", "x"], [2, "r", "100x50"], [3, "m", "end"]]
