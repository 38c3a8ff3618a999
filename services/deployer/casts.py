"""What was seen in a terminal as an asciicast, version 2: a header, then a line for each event. Pure.

Output is recorded as it was shown. Input is recorded only where there is no TTY: a TTY echoes what is typed, and what
it does not echo are passwords.

Source: docs.asciinema.org/manual/asciicast/v2.
"""

import codecs
import json
from collections.abc import Sequence


class Cast:
    """Events to lines. Times are seconds since the beginning."""

    def __init__(self) -> None:
        # A character may come in two pieces.
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {code: decoder("replace") for code in "oi"}

    @staticmethod
    def header(command: Sequence[str], title: str, timestamp: int, columns: int, rows: int) -> str:
        """The first line."""
        known = {
            "version": 2,
            "width": columns or 80,
            "height": rows or 24,
            "timestamp": timestamp,
            "command": " ".join(command),
            "title": title,
        }
        return json.dumps(known, ensure_ascii=False) + "\n"

    def output(self, at: float, data: bytes) -> str:
        """Something was shown."""
        return self._text(at, "o", data)

    def input(self, at: float, data: bytes) -> str:
        """Something was sent."""
        return self._text(at, "i", data)

    def resize(self, at: float, columns: int, rows: int) -> str:
        """The window has another size."""
        return _line(at, "r", f"{columns}x{rows}")

    def marker(self, at: float, text: str) -> str:
        """Something for the reader."""
        return _line(at, "m", text)

    def _text(self, at: float, code: str, data: bytes) -> str:
        text = self._decoders[code].decode(data)
        return _line(at, code, text) if text else ""


def _line(at: float, code: str, text: str) -> str:
    return json.dumps([round(at, 6), code, text], ensure_ascii=False) + "\n"
