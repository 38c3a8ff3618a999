"""What a check says."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a finding is. Only an ERROR that is not repaired makes the check fail."""

    ERROR = "ERROR"
    """Something that was promised does not hold."""
    WARNING = "WARNING"
    """Something that a person should look at."""
    NOTE = "NOTE"
    """Something that goes away by itself."""


Repair = Callable[[], Awaitable[bool]]
"""Mends what was found, in one transaction that looks again first; whether it was mended."""


@dataclass
class Finding:
    """One inconsistency: which check found it where, what is wrong, what to do."""

    check: str
    severity: Severity
    service: str
    resource: str
    what: str
    then: str
    digest: str = ""
    """Of the blob that it is about."""
    repaired: bool = False
    repair: Repair | None = field(default=None, repr=False, compare=False)

    def data(self) -> dict[str, Any]:
        """For a program."""
        return {
            "check": self.check,
            "severity": self.severity.value,
            "service": self.service,
            "resource": self.resource,
            "what": self.what,
            "then": self.then,
            "repairable": self.repair is not None,
            "repaired": self.repaired,
        }

    @property
    def failed(self) -> bool:
        """Whether it makes the whole check fail."""
        return self.severity is Severity.ERROR and not self.repaired
