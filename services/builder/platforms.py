"""Which platform this machine is."""

import platform as machine

from services.content.images import Platform

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The kernel's names → OCI's, which are Go's."""


def here() -> Platform:
    """The platform of this machine."""
    name = machine.machine()
    return Platform("linux", _ARCHITECTURES.get(name, name))
