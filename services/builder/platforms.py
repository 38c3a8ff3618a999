"""Which platform this machine is."""

from services.content.images import Platform


def here() -> Platform:
    """The platform of this machine."""
    return Platform.here()
