"""How connections from Envoy notice that the machine at the other end is no more.

Power that fails and a cable that is cut send nothing. Left alone, Linux takes a connection for alive for two hours
where all that was sent has arrived, and repeats what has not for a quarter of an hour.
"""

import functools
import socket
import sys
from typing import Any

KEEPALIVE = {"keepalive_time": 8, "keepalive_interval": 3, "keepalive_probes": 4}
"""Who waits for an answer asks the other end's kernel whether it is there: one that is not is given up after 20 s. A
process that thinks answers by its kernel, however long it takes."""

_TCP_RTO_MAX_MS = 44  # Linux 6.15 and later (include/uapi/linux/tcp.h); Python has no name for it.
_TCP_USER_TIMEOUT = 18
_RTO_MAX_MS = 1_500
"""What has not arrived is repeated so often at least: fifteen times (net.ipv4.tcp_retries2) are over after 21 s."""
_USER_TIMEOUT_MS = 60_000
"""Where the kernel does not have the former. It also ends connections to living processes that do not read for so
long, with a large request in hand, and holds for keepalives too: hence a minute, not 20 s."""


def noticing_lost_peers() -> dict[str, Any]:
    """Fields of a cluster of Envoy's. On Unix sockets, where nothing gets lost, they have no effect."""
    option = _retransmission()
    return {
        "upstream_connection_options": {"tcp_keepalive": dict(KEEPALIVE)},
        **({"upstream_bind_config": {"socket_options": [option]}} if option else {}),
    }


@functools.cache
def _retransmission() -> dict[str, Any]:
    """The socket option that bounds repetition; Envoy runs on the gateway's own kernel. Nothing where it has none."""
    if sys.platform != "linux":
        return {}
    for name, number, value in (
        ("TCP_RTO_MAX_MS", _TCP_RTO_MAX_MS, _RTO_MAX_MS),
        ("TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT, _USER_TIMEOUT_MS),
    ):
        with socket.socket() as probe:
            try:
                probe.setsockopt(socket.IPPROTO_TCP, number, value)
            except OSError:
                continue
        level = int(socket.IPPROTO_TCP)
        return {"description": name, "level": level, "name": number, "int_value": value, "state": "STATE_PREBIND"}
    return {}
