"""Leases as rows, which no clock can break.

Who holds a lease counts a number in its row up now and then; who would take it over watches that number. Where it
stood still for as long as the lease lasts, by the watcher's own monotonic clock, the holder is dead, or as good as.
No time is ever compared with another machine's, so that a clock which is set forward or back by an hour, on either
side or in the database, takes nobody's lease and keeps none.

A holder that only slept still believes in its lease: so each of its writes names the token that it was given with it,
and a row that has another token by then takes none of them.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from services.kernel.clock import Clock


class Vigil:
    """Watches the signs of life of many leases."""

    def __init__(self, patience_s: float, clock: Clock) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._seen: dict[str, tuple[object, float]] = {}
        self._looked = clock.monotonic()

    def silent(self, signs: Mapping[str, object]) -> list[str]:
        """Keys of `signs` that are what they were for `patience_s`. To be asked again and again.

        Who looked away for longer than that (a machine that slept, a database that was away and let nobody renew)
        begins anew: it does not know who was dead meanwhile.
        """
        now = self._clock.monotonic()
        if now - self._looked > self._patience_s:
            self._seen.clear()
        self._looked = now
        seen = self._seen
        self._seen = {}
        for key, sign in signs.items():
            known = seen.get(key)
            self._seen[key] = known if known is not None and known[0] == sign else (sign, now)
        return [key for key, (_, since) in self._seen.items() if now - since >= self._patience_s]


def id_kept_in(file: Path, first: str = "") -> str:
    """An id that `file` keeps for whoever uses its folder; of several who ask at once all get the same.

    It is random, unless there is none yet and `first` says another.
    """
    if not file.exists():
        fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write((first or secrets.token_hex(16)) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        try:
            file.hardlink_to(fresh)
        except FileExistsError:
            pass  # another was faster
        finally:
            fresh.unlink()
    return file.read_text().strip()
