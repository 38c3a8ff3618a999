"""Own ports of deployments."""

import socket

from ekiben.errors import ResourceExhausted
from services.deployer.settings import Settings
from services.deployer.store import Store


async def free_port(settings: Settings, store: Store) -> int:
    """One that no deployment has and nobody listens at; 0 where deployments have none.

    Raises:
        ResourceExhausted: there is none (PORTS_EXHAUSTED).
    """
    if not settings.has_ports:
        return 0
    first, last = settings.ports
    taken = await store.ports()
    for port in range(first, last + 1):
        if port not in taken and _bindable(settings.host, port):
            return port
    raise ResourceExhausted(
        f"No port from {first} to {last} is free; delete a deployment or widen the range.",
        reason="PORTS_EXHAUSTED",
        port_range=settings.port_range,
    )


def _bindable(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
