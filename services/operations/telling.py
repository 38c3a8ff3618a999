"""What is told while something long goes on: a line that changes on a terminal, now and then a line elsewhere."""

import sys
import time

from ekiben.cli.output import size
from ekiben.cli.progress import Steps

_EVERY_S = 10.0


class Teller:
    """Tells on stderr what is being done, and how many blobs of how many have passed."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._text = ""
        self._blobs = self._bytes = 0
        self._told = time.monotonic()

    def say(self, text: str) -> None:
        """Begin something else."""
        self._text, self._blobs, self._bytes = text, 0, 0
        self._steps.now(text)

    def progress(self, blobs: int, size_bytes: int) -> None:
        """So many more blobs and bytes have passed."""
        self._blobs += blobs
        self._bytes += size_bytes
        now = time.monotonic()
        if now - self._told >= (0.2 if sys.stderr.isatty() else _EVERY_S):
            self._told = now
            self._steps.now(f"{self._text}: {self._blobs:,}, {size(self._bytes)}")

    def done(self, text: str) -> None:
        """Leave a line that stays."""
        self._steps.done(text)
