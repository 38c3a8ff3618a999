"""The deployer's route table as domain objects, and clusters and endpoints as Envoy's resources (JSON as dictionaries).

Source: Envoy 1.40's v3 API: envoy/config/cluster/v3, envoy/config/endpoint/v3.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.gateway.domain import (
    DEFAULT_BODY_BYTES,
    MAX_BODY_BYTES,
    Capture,
    Endpoint,
    InternalRoute,
    Route,
    RouteTable,
    Target,
)
from services.gateway.sockets import noticing_lost_peers

Resource = dict[str, Any]
TYPES = "type.googleapis.com/envoy."
MANY = 1 << 30
"""For limits that are not Envoy's to set: replicas and services have their own."""
REPLICA_IDLE_S = 4
"""Idle connections to replicas are closed after so long. BentoML's server (uvicorn) closes its own after 5 s, and
a request sent into that moment would fail."""
CHECK_S = 2
"""How often each of several is asked whether it is the one to be called: within so long a takeover is known."""


class Tables:
    """Route tables one after another. A route that is as it was before is the very same object as then."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[pb.Route, Route]] = {}

    def read(self, table: pb.RouteTable) -> RouteTable:
        """The route table, as the deployer sends it."""
        before, self._known = self._known, {}
        routes = []
        for sent in table.routes:
            known = before.get(sent.deployment)
            if known is None or known[0] != sent:
                kept = pb.Route()
                kept.CopyFrom(sent)  # A part of a message keeps the whole of it in memory.
                known = kept, _route_from_proto(sent)
            self._known[sent.deployment] = known
            routes.append(known[1])
        return RouteTable(table.version, tuple(routes))


def table_from_proto(table: pb.RouteTable) -> RouteTable:
    """One route table, as the deployer sends it."""
    return Tables().read(table)


def _route_from_proto(route: pb.Route) -> Route:
    return Route(
        deployment=route.deployment,
        organization=route.organization,
        hosts=tuple(host.lower() for host in route.hosts),
        port=route.port,
        access_authorization=route.access_authorization,
        capture=_capture_from_proto(route.capture),
        targets=tuple(
            Target(
                target=target.target or "main",
                revision=target.revision,
                bento=target.bento,
                models=tuple(target.models),
                weight=target.weight,
                service=target.service,
                endpoints=_endpoints_from_proto(target.endpoints),
            )
            for target in route.targets
        ),
        not_ready_detail=route.not_ready_detail,
        route_type=route.route_type,
        route_by=route.route_by,
        internal_routes=tuple(
            InternalRoute(
                revision=each.revision,
                target=each.target or "main",
                service=each.service,
                socket_path=each.socket_path,
                endpoints=_endpoints_from_proto(each.endpoints),
            )
            for each in route.internal_routes
            if each.socket_path  # Else the services of the bento have their own ways to one another.
        ),
    )


def _capture_from_proto(policy: pb.CapturePolicy) -> Capture | None:
    percent = policy.sample_percent if policy.HasField("sample_percent") else 100.0
    limit = policy.max_body_bytes if policy.HasField("max_body_bytes") else DEFAULT_BODY_BYTES
    if policy.disabled or percent <= 0:
        return None
    return Capture(
        min(percent, 100.0),
        max(0, min(limit, MAX_BODY_BYTES)),
        frozenset(header.strip().lower() for header in policy.redacted_headers),
    )


def _endpoints_from_proto(endpoints: Sequence[pb.Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(endpoint.replica, endpoint.address) for endpoint in endpoints)


@dataclass(frozen=True)
class Peer:
    """A service of the suite as Envoy dials it."""

    name: str
    address: str
    """`unix:/path`, `host:port`, `http://host:port` or `https://host:port`."""
    http2: bool
    ca_file: Path | None = None
    """Roots for TLS; a Unix socket never has it."""
    cert_file: Path | None = None
    key_file: Path | None = None
    serving: str = ""
    """Of several at the address, those are called that say in grpc.health.v1 that they serve this; all where empty."""


def address(text: str) -> Resource:
    """An address of Envoy's from `unix:/path`, `host:port` or a URL.

    Raises:
        ValueError: none of these.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        return {"pipe": {"path": "/" + path.lstrip("/") if path.startswith("//") else path}}
    url = urlsplit(text if "://" in text else f"http://{text}")
    if url.hostname is None or url.port is None:
        raise ValueError(f"{text!r} is neither unix:PATH nor HOST:PORT.")
    return {"socket_address": {"address": url.hostname, "port_value": url.port}}


def peer_cluster(peer: Peer) -> Resource:
    """The cluster of a service of the suite. Host names are resolved again and again."""
    url = urlsplit(peer.address)
    secure = not peer.address.startswith("unix:") and (url.scheme == "https" or (peer.ca_file and url.scheme != "http"))
    cluster: Resource = {
        "@type": f"{TYPES}config.cluster.v3.Cluster",
        "name": peer.name,
        "type": "STATIC" if peer.address.startswith("unix:") else "STRICT_DNS",
        "connect_timeout": "5s",
        "per_connection_buffer_limit_bytes": 1 << 20,
        **noticing_lost_peers(),
        "circuit_breakers": _no_breakers(),
        "load_assignment": {
            "cluster_name": peer.name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(peer.address)}}]}],
        },
        "typed_extension_protocol_options": _protocol(http2=peer.http2, idle_s=3600 if peer.http2 else 30),
    }
    if peer.serving and not peer.address.startswith("unix:"):
        cluster |= _chosen(peer.serving)
    if secure:
        host = urlsplit(peer.address if "://" in peer.address else f"//{peer.address}").hostname or ""
        by_address = _is_address(host)
        validation: Resource = {"trusted_ca": {"filename": str(peer.ca_file or "/etc/ssl/certs/ca-certificates.crt")}}
        if by_address:
            validation["match_typed_subject_alt_names"] = [{"san_type": "IP_ADDRESS", "matcher": {"exact": host}}]
        common: Resource = {"validation_context": validation, "alpn_protocols": ["h2"] if peer.http2 else ["http/1.1"]}
        if peer.cert_file and peer.key_file:
            common["tls_certificates"] = [
                {
                    "certificate_chain": {"filename": str(peer.cert_file)},
                    "private_key": {"filename": str(peer.key_file)},
                }
            ]
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{TYPES}extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": common,
                # SNI never carries an address (RFC 6066, section 3): the certificate is held against it above.
                **({} if by_address else {"sni": host, "auto_sni_san_validation": True}),
            },
        }
    return cluster


def _chosen(serving: str) -> Resource:
    """Calls go to those that say they serve it. While none does they fail at once: never to all, as is Envoy's way."""
    check: Resource = {
        "timeout": f"{CHECK_S}s",
        "interval": f"{CHECK_S}s",
        # Without it those that nobody called for a while would be asked once a minute.
        "no_traffic_interval": f"{CHECK_S}s",
        "healthy_threshold": 1,
        "unhealthy_threshold": 2,
        "grpc_health_check": {"service_name": serving},
    }
    return {
        "health_checks": [check],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        # A pod that is gone from the name is not asked any more: its address may be another's by then.
        "ignore_health_on_host_removal": True,
    }


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def replica_cluster(name: str, endpoints_file: Path, facts: str = "") -> Resource:
    """The cluster of a set of replicas. `facts` are what a capture says of them, see `facts_of`.

    A replica that does not take connections is left alone for 5 s, as long as half of the others do.
    """
    cluster: Resource = {
        "@type": f"{TYPES}config.cluster.v3.Cluster",
        "name": name,
        "type": "EDS",
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": 1 << 20,
        **noticing_lost_peers(),
        "eds_cluster_config": {"eds_config": file_source(endpoints_file)},
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": _no_breakers(),
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 2,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
            "interval": "1s",
            "base_ejection_time": "5s",
            "max_ejection_time": "5s",
            "max_ejection_percent": 50,
        },
        "typed_extension_protocol_options": _protocol(http2=False, idle_s=REPLICA_IDLE_S),
    }
    if facts:
        cluster["metadata"] = {"filter_metadata": {"ekiben": {"facts": facts}}}
    return cluster


def replica_endpoints(name: str, endpoints: Sequence[Endpoint]) -> Resource:
    """The endpoints of a replica cluster, each with its replica's id as metadata."""
    return {
        "@type": f"{TYPES}config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": name,
        "endpoints": [
            {
                "lb_endpoints": [
                    {
                        "endpoint": {"address": address(endpoint.address)},
                        "metadata": {"filter_metadata": {"ekiben": {"replica": endpoint.replica}}},
                    }
                    for endpoint in sorted(endpoints, key=lambda each: each.replica)
                ]
            }
        ]
        if endpoints
        else [],
    }


def file_source(path: Path) -> Resource:
    """A configuration source: a file, which Envoy reads again when another is renamed over it."""
    return {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}


def facts_of(route: Route, target: Target) -> str:
    """What a capture says of the target that answered, whatever the route table says by the time it is read.

    Fields divided by spaces, each percent-encoded: text that needs no escapes in JSON is cheaper for Envoy to write.
    """
    fields = (route.organization, route.deployment, target.revision, target.target, target.bento, *target.models)
    return " ".join(quote(field, safe="/:") for field in fields)


def read_facts(text: str) -> dict[str, Any]:
    """The fields of a prediction that `facts_of` put into a text.

    Raises:
        ValueError: it did not.
    """
    organization, deployment, revision, target, bento, *models = map(unquote, text.split(" "))
    return {
        "organization": organization,
        "deployment": deployment,
        "revision": revision,
        "target": target,
        "bento": bento,
        "models": models,
    }


def _no_breakers() -> Resource:
    limits = {"max_connections": MANY, "max_pending_requests": MANY, "max_requests": MANY, "max_retries": MANY}
    return {"thresholds": [{"priority": "DEFAULT", **limits}]}


def _protocol(*, http2: bool, idle_s: int) -> Resource:
    windows = {"initial_stream_window_size": 1 << 20, "initial_connection_window_size": 16 << 20}
    return {
        f"{TYPES.split('/')[1]}extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{TYPES}extensions.upstreams.http.v3.HttpProtocolOptions",
            "common_http_protocol_options": {"idle_timeout": f"{idle_s}s", "max_headers_count": 1000},
            "explicit_http_config": {"http2_protocol_options": windows} if http2 else {"http_protocol_options": {}},
        }
    }
