"""Channels to a server of the suite: address, TLS, identity, deadlines, retries, and errors as our classes.

    channel = open_channel("http://127.0.0.1:7400", token=token)
    stub = registry_pb2_grpc.ModelsStub(channel)
    await stub.GetModel(request)          # raises ekiben.errors.NotFound, not grpc.RpcError

All four kinds of call raise the class that the server raised. A call without a timeout gets the channel's default,
a response stream gets none. What is safe to repeat is retried while the server is UNAVAILABLE (AIP-194).
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from grpc import aio

from ekiben.calls import (
    REQUEST_ID_KEY,
    STATUS_KEY,
    CallObserver,
    CallSettings,
    OwnTrace,
    RaisingChannel,
    from_rpc_error,
    traceparent,
)
from ekiben.errors import InvalidArgument, Unauthenticated, Unavailable

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "MAX_MESSAGE_BYTES",
    "REQUEST_ID_KEY",
    "STATUS_KEY",
    "CallObserver",
    "Tls",
    "checked_token",
    "from_rpc_error",
    "open_channel",
    "parse_address",
    "traceparent",
    "wait_until_ready",
]

DEFAULT_TIMEOUT_S = 30.0
MAX_MESSAGE_BYTES = 16 << 20
"""The largest message either way: a manifest of a few megabytes fits, bytes go over the blobs endpoint."""

# Methods by these prefixes read, or may be repeated without harm: what is retried when the server is away.
_IDEMPOTENT = (
    "Get",
    "List",
    "Watch",
    "Read",
    "Tail",
    "Authenticate",
    "Sign",
    "Record",
    "Acknowledge",
    "Reveal",
    "Claim",
    "Report",
)
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2.0,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@dataclass(frozen=True)
class Tls:
    """How to know the server, and to be known by it. Files are PEM."""

    ca_file: Path | None = None
    """Roots that the server's certificate must chain to; None means those that gRPC brings."""
    cert_file: Path | None = None
    """Own certificate chain, for servers that ask for one."""
    key_file: Path | None = None
    """Its private key."""
    server_name: str = ""
    """Name that the certificate must carry when it is not the address's."""


def open_channel(
    address: str,
    *,
    token: str | None = None,
    tls: Tls | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    metadata: Callable[[], Iterable[tuple[str, str]]] | None = None,
    observe: Callable[[str], CallObserver] | None = None,
    wait_for_ready: bool | None = None,
    serving: str = "",
) -> aio.Channel:
    """A channel to `address`; it connects with its first call. Close it, or use it as an async context manager.

    Args:
        address: `host:port`, `unix:/path`, `http://host[:port]` or `https://host[:port]`.
        token: API token, sent with every call that brings no `authorization` of its own.
        tls: dial over TLS; `https://` alone does too, with gRPC's own roots.
        timeout_s: deadline of calls that set none; response streams get none.
        metadata: asked for more metadata at each call; a key that the call brings itself is left alone.
        observe: makes the observer of a call from its method; by default one that sends a `traceparent`.
        wait_for_ready: default of the calls: whether to wait, up to the deadline, for a server that is away.
        serving: name of a service in grpc.health.v1. Of the addresses that the host has, calls go to those that say
            they serve it; the others are connected to and asked, so that a change of theirs counts at once.

    Raises:
        InvalidArgument: the address has none of these forms (ADDRESS_INVALID), or a TLS file cannot be read.
        Unauthenticated: the token holds what no token does (TOKEN_INVALID).
    """
    target, over_tls = parse_address(address)
    token = checked_token(token or "")

    def headers() -> list[tuple[str, str]]:
        pairs = list(metadata()) if metadata is not None else []
        if token and not any(key == "authorization" for key, _ in pairs):
            pairs.append(("authorization", f"Bearer {token}"))
        return pairs

    settings = CallSettings(headers, observe or OwnTrace, timeout_s, wait_for_ready)
    options = _options(target, serving)
    if tls is None and not over_tls:
        return RaisingChannel(aio.insecure_channel(target, options=options), settings)
    tls = tls or Tls()
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    try:
        credentials = grpc.ssl_channel_credentials(
            tls.ca_file.read_bytes() if tls.ca_file else None,
            tls.key_file.read_bytes() if tls.key_file else None,
            tls.cert_file.read_bytes() if tls.cert_file else None,
        )
    except OSError as exc:
        raise InvalidArgument(f"A TLS file cannot be read: {exc}.", reason="TLS_FILE_UNREADABLE") from exc
    return RaisingChannel(aio.secure_channel(target, credentials, options=options), settings)


def parse_address(address: str) -> tuple[str, bool]:
    """gRPC's target for `address`, and whether it asks for TLS.

    Raises:
        InvalidArgument: not one of the forms that `open_channel` takes (ADDRESS_INVALID).
    """
    if address.startswith("unix:") and len(address) > 5:
        return address, False
    if address.startswith(("http://", "https://")):
        url = urlsplit(address)
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
        except ValueError:
            port = 0
        if url.hostname and port and url.path in ("", "/") and not url.query:
            host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
            return f"{host}:{port}", url.scheme == "https"
    else:
        host, _, digits = address.rpartition(":")
        if host and digits.isdigit() and int(digits) < 65536 and "/" not in host:
            return address, False
    raise InvalidArgument(
        f"{address!r} is not an address: use host:port, unix:/path, http://host:port or https://host:port.",
        reason="ADDRESS_INVALID",
        address=address,
    )


def checked_token(token: str) -> str:
    """`token` without white space around it, fit for a header.

    Raises:
        Unauthenticated: it holds white space, control or other characters that no token does (TOKEN_INVALID).
    """
    token = token.strip()
    if all("!" <= character <= "~" for character in token):
        return token
    raise Unauthenticated("The token holds characters that no API token does.", reason="TOKEN_INVALID")


def _options(target: str, serving: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 32 << 10),
        ("grpc.absolute_max_metadata_size", 64 << 10),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(_service_config() | _choice(serving))),
        # A server that restarts is back within a second or two; gRPC's own backoff goes up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # A watch may be silent for hours: find out within a minute that the other side is gone; and about as soon as
        # somebody else serves in its place, where that is so. (Servers of the suite take a ping every ten seconds.)
        ("grpc.keepalive_time_ms", 15_000 if serving else 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Once none of the known addresses answers, or serves, others may have come: pods that an update put in their
        # place. By default gRPC does not look a name up again for 30 s, and all calls fail meanwhile.
        ("grpc.dns_min_time_between_resolutions_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    host = target.rpartition(":")[0]
    if target.startswith("unix:") or host in ("localhost", "127.0.0.1", "[::1]"):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _choice(serving: str) -> dict[str, Any]:
    """gRPC's service config for client-side health checks (its proposal A17), which `pick_first` does not make."""
    if not serving:
        return {}
    return {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": serving}}


_config: dict[str, Any] = {}


def _service_config() -> dict[str, Any]:
    """gRPC's retry policy for every idempotent method of the suite's APIs."""
    if not _config:
        from ekiben.builder.v1 import builder_pb2, images_pb2
        from ekiben.deployer.v1 import deployer_pb2, events_pb2, terminals_pb2
        from ekiben.identity.v1 import identity_pb2
        from ekiben.recorder.v1 import recorder_pb2
        from ekiben.registry.v1 import aliases_pb2, deletions_pb2, files_pb2, lineage_pb2, registry_pb2

        names = [
            {"service": service.full_name, "method": method.name}
            for api in (
                aliases_pb2,
                builder_pb2,
                deletions_pb2,
                deployer_pb2,
                events_pb2,
                files_pb2,
                identity_pb2,
                images_pb2,
                lineage_pb2,
                recorder_pb2,
                registry_pb2,
                terminals_pb2,
            )
            for service in api.DESCRIPTOR.services_by_name.values()
            for method in service.methods
            if method.name.startswith(_IDEMPOTENT)
        ]
        _config["methodConfig"] = [{"name": names, "retryPolicy": _RETRY}]
    return _config


async def wait_until_ready(channel: aio.Channel, timeout_s: float) -> None:
    """Return once the channel is connected.

    Raises:
        Unavailable: it is not within `timeout_s` (SERVER_UNREACHABLE).
    """
    try:
        async with asyncio.timeout(timeout_s):
            await channel.channel_ready()
    except TimeoutError:
        raise Unavailable(
            f"The server cannot be reached within {timeout_s:g} s.", reason="SERVER_UNREACHABLE"
        ) from None
