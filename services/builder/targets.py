"""What a Python environment is made for when it is made for an image: not this machine, but the base. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ekiben.errors import FailedPrecondition
from services.content.images import Platform

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_GLIBC = (17, 28, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40)
"""Versions 2.N of the GNU C library that uv knows wheels for."""


@dataclass(frozen=True)
class Target:
    """A Python on a platform."""

    platform: Platform
    python: str
    """`3.11.2`, or `3.11` where the base does not tell more: then nothing is taken that needs a later 3.11."""
    libc: str = ""
    """`glibc 2.36` or `musl`; where it is not known, what runs with any glibc is taken."""

    sources: tuple[str, ...] = ()
    """Packages that are built from source; of all others there are wheels only. Canonical names, in order."""

    @property
    def minor(self) -> str:
        """`3.11`."""
        return ".".join(self.python.split(".")[:2])

    @property
    def name(self) -> str:
        """As uv names the platform, `x86_64-manylinux_2_36`.

        Raises:
            FailedPrecondition: there are no wheels for such a platform (PLATFORM_UNSUPPORTED).
        """
        machine = _MACHINES.get(self.platform.architecture)
        if self.platform.os != "linux" or machine is None:
            raise FailedPrecondition(
                f"Python packages for {self.platform} are not looked for; there are linux/amd64 and linux/arm64.",
                reason="PLATFORM_UNSUPPORTED",
                platform=str(self.platform),
            )
        if self.libc == "musl":
            return f"{machine}-unknown-linux-musl"
        version = re.fullmatch(r"glibc 2\.(\d+)", self.libc)
        at_most = int(version[1]) if version else _GLIBC[0]
        return f"{machine}-manylinux_2_{max((each for each in _GLIBC if each <= at_most), default=_GLIBC[0])}"

    @property
    def key(self) -> str:
        """Equal for targets that the same environment fits."""
        return " ".join([self.python, self.name, *self.sources])

    @property
    def arguments(self) -> tuple[str, ...]:
        """What tells uv what to install for."""
        return ("--python-platform", self.name, "--python-version", self.python, "--only-binary", ":all:")

    @property
    def resolving(self) -> tuple[str, ...]:
        """What tells uv what to resolve for."""
        return (*self.arguments, *(part for name in self.sources for part in ("--no-binary", name)))

    @staticmethod
    def options_of(options: Sequence[str]) -> list[str]:
        """The options of a bento's requirements without what is decided here: what is built from source."""
        return [each for each in options if not each.startswith(("--no-binary", "--only-binary"))]

    def __str__(self) -> str:
        return f"Python {self.python} on {self.platform} ({self.libc or 'any glibc'})"
