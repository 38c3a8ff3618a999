"""Routes as Envoy's resources: the deployments' hosts, the suite's gRPC methods, and everything else to the HTTP front.

Source: Envoy 1.40's v3 API: envoy/config/route/v3.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from google.api import annotations_pb2

from services.gateway.bindings import API_FILES, PEERS
from services.gateway.domain import REDACTED_ALWAYS, Route, RouteTable, Target, cluster_of
from services.gateway.messages import TYPES, Resource
from services.kernel.problems import DOCS

CAPTURE = "ekiben.capture"
"""Name of the capture filter in the chain; also the key of its settings in a route's metadata."""
ADMISSION = "envoy.filters.http.ext_authz"
"""Name of the filter that asks whether a request may pass."""
HTTP_FRONT, BLOBS, IMAGES, ADMISSION_CLUSTER = "http", "blobs", "images", "admission"
_COMMON_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
_QUIET_PATHS = ("/readyz", "/livez", "/healthz", "/metrics")
"""Asked for by machines all the time; a trace of each would hide the others."""
READ_AT_ONCE_BYTES = 65_536
"""A longer body is read by uvicorn as fast as the service takes it; its HIGH_WATER_LIMIT."""
_ON = {"@type": f"{TYPES}config.route.v3.FilterConfig", "config": {}}


def public_methods() -> dict[str, str]:
    """Path of each gRPC method that a client may call, and the peer which serves it."""
    return {
        f"/{service.full_name}/{method.name}": PEERS[file.package]
        for file in API_FILES
        for service in file.services_by_name.values()
        for method in service.methods
        if method.GetOptions().HasExtension(annotations_pb2.http)
    }


def internal_methods() -> list[str]:
    """Path of each gRPC method that only the services of the suite call."""
    return [
        f"/{service.full_name}/{method.name}"
        for file in API_FILES
        for service in file.services_by_name.values()
        for method in service.methods
        if not method.GetOptions().HasExtension(annotations_pb2.http)
    ]


def public_routes(table: RouteTable, *, domain: str, api_hosts: Sequence[str], peers: Iterable[str]) -> Resource:
    """The route configuration of the public port."""
    taken: set[str] = {domain, *api_hosts}
    hosts = []
    for route in table.routes:
        domains = sorted(set(route.hosts) - taken)
        taken.update(domains)
        if domains:
            hosts.append({"name": route.deployment, "domains": domains, **_deployment(route)})
    unknown = _problem(
        404, "Not found", "HOST_UNKNOWN", f"No deployment has this host name below {domain}.", "NOT_FOUND"
    )
    return {
        "@type": f"{TYPES}config.route.v3.RouteConfiguration",
        "name": "public",
        "ignore_port_in_host_matching": True,
        "max_direct_response_body_size_bytes": 1 << 20,
        "virtual_hosts": [
            {
                "name": "api",
                "domains": ["*", domain, *sorted(set(api_hosts) - {domain})],
                "routes": _api_routes(set(peers)),
            },
            *hosts,
            {"name": "unknown", "domains": [f"*.{domain}"], "routes": [{"match": {"prefix": "/"}, **unknown}]},
        ],
    }


def own_port_routes(route: Route) -> Resource:
    """The route configuration of a deployment's own port: every host name means the deployment."""
    return {
        "@type": f"{TYPES}config.route.v3.RouteConfiguration",
        "name": f"port_{route.id}",
        "max_direct_response_body_size_bytes": 1 << 20,
        "virtual_hosts": [{"name": route.deployment, "domains": ["*"], **_deployment(route)}],
    }


def internal_routes(cluster: str, service: str) -> Resource:
    """The route configuration of the listener between the services of a bento."""
    return {
        "name": cluster,
        "virtual_hosts": [
            {
                "name": service,
                "domains": ["*"],
                "routes": [
                    {
                        "match": {"prefix": "/"},
                        "route": {"cluster": cluster, **_streaming(), "retry_policy": _safe_retries()},
                        "request_headers_to_add": [_last_if_large()],
                        "metadata": _says(
                            "REPLICA_UNREACHABLE", f"No replica of the service {service} can be reached.", service
                        ),
                    }
                ],
            }
        ],
    }


def _deployment(route: Route) -> Resource:
    """What a virtual host holds for a deployment."""
    filters: Resource = {CAPTURE: _ON}
    if route.access_authorization:
        filters[ADMISSION] = _ON
    return {
        "routes": _deployment_routes(route),
        "typed_per_filter_config": filters,
        "request_headers_to_remove": ["x-yatai-api-token"],
    }


def _deployment_routes(route: Route) -> list[Resource]:
    shares = route.shares()
    if not shares:
        detail = route.not_ready_detail or f"{route.deployment} has no replica that is ready."
        problem = _problem(503, "Service unavailable", "DEPLOYMENT_NOT_READY", detail, "UNAVAILABLE")
        problem["response_headers_to_add"].append(_header("retry-after", "1"))
        return [{"match": {"prefix": "/"}, **problem}]
    routes = [_to_replicas(route, [(target, 1)], _names(route, target)) for target in route.named()]
    return [*routes, _to_replicas(route, shares, {"prefix": "/"})]


def _names(route: Route, target: Target) -> Resource:
    exact = {"name": route.route_by, "string_match": {"exact": target.target}}
    return {"prefix": "/", "headers" if route.named_by == "header" else "query_parameters": [exact]}


def _to_replicas(route: Route, shares: Sequence[tuple[Target, int]], match: Resource) -> Resource:
    named = [(cluster_of(route.deployment, target.target, target.revision), weight) for target, weight in shares]
    action: Resource = {**_streaming(), "retry_policy": _safe_retries()}
    if len(named) == 1:
        action["cluster"] = named[0][0]
    else:
        action["weighted_clusters"] = {"clusters": [{"name": name, "weight": weight} for name, weight in named]}
    metadata = _says("REPLICA_UNREACHABLE", f"No replica of {route.deployment} can be reached.", route.deployment)
    if route.capture is not None:
        own = sorted(route.capture.redacted_headers - REDACTED_ALWAYS)
        metadata["filter_metadata"][CAPTURE] = {
            "percent": route.capture.sample_percent,
            "max": route.capture.max_body_bytes,
            **({"redacted": "\n" + "\n".join(own) + "\n"} if own else {}),
        }
    return {
        "match": match,
        "route": action,
        "metadata": metadata,
        "request_headers_to_add": [_last_if_large()],
    }


def _api_routes(peers: set[str]) -> list[Resource]:
    routes: list[Resource] = []
    for path, peer in public_methods().items():
        if peer in peers:
            routes.append(_to_peer({"path": path, "grpc": {}}, peer))
    if "registry" in peers:
        routes += [_to_peer({"prefix": f"/{name}/", "grpc": {}}, "registry") for name in _COMMON_SERVICES]
    # Envoy turns the status into a gRPC one: 403 into PERMISSION_DENIED, 404 into UNIMPLEMENTED.
    for path in internal_methods():
        routes.append(
            {"match": {"path": path, "grpc": {}}, **_refusal(403, "This method is for the services of the suite.")}
        )
    routes.append({"match": {"prefix": "/", "grpc": {}}, **_refusal(404, "There is no such method.")})
    for path in _QUIET_PATHS:
        routes.append({**_to_peer({"path": path}, HTTP_FRONT), "tracing": _never()})
    if BLOBS in peers:
        routes.append(_to_peer({"prefix": "/blobs/"}, BLOBS))
    if IMAGES in peers:
        routes += [_to_peer(match, IMAGES) for match in ({"path": "/v2"}, {"prefix": "/v2/"})]
    routes.append(_to_peer({"prefix": "/"}, HTTP_FRONT))
    return routes


def _to_peer(match: Resource, peer: str) -> Resource:
    return {
        "match": match,
        "route": {"cluster": peer, **_streaming(), "retry_policy": _safe_retries()},
        "metadata": _says("PEER_UNREACHABLE", f"The part {peer} of the suite cannot be reached."),
    }


def _streaming() -> Resource:
    # No limit on the whole: a stream may last for days, and replicas have timeouts of their own.
    return {"timeout": "0s"}


def _safe_retries() -> Resource:
    """Only where the first one did not get the request."""
    return {
        "retry_on": "connect-failure,refused-stream,reset-before-request",
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": f"{TYPES}extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
            }
        ],
        # A dead replica has the fewest requests, so that it is chosen three times of four where it is one of two.
        "host_selection_retry_max_attempts": 30,
    }


def _last_if_large() -> Resource:
    """Has a replica close its connection after a request whose body it may have to stop reading.

    It would handle every later request on the connection in the context of that one, so that their spans and monitored
    values would be of its trace: CPython before 3.15 starts to read again in the context of whoever asks it to, and
    uvicorn asks from within the request (issue 140947 of CPython).
    """
    length = "request.headers['content-length']"
    large = (
        f"'content-length' in request.headers ? size({length}) > 5 || int({length}) > {READ_AT_ONCE_BYTES}"
        " : request.method in ['POST', 'PUT', 'PATCH']"
    )
    return {
        "header": {"key": "connection", "value": f"%CEL(({large}) ? 'close' : '')%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def _says(reason: str, detail: str, named: str = "") -> Resource:
    """What `listeners` reads: of the local reply when no upstream answers, and the name in the trace."""
    says = {"type": type_of(reason), "reason": reason, "detail": detail, **({"named": named} if named else {})}
    return {"filter_metadata": {"ekiben": says}}


def _never() -> Resource:
    none = {"numerator": 0, "denominator": "HUNDRED"}
    return {"client_sampling": none, "random_sampling": none, "overall_sampling": none}


def type_of(reason: str) -> str:
    """Where a reason is explained."""
    return f"{DOCS}/errors#{reason.lower().replace('_', '-')}"


def problem(status: int, title: str, reason: str, detail: str, code: str) -> dict[str, Any]:
    """An RFC 9457 problem, with the member `error` that the Open Inference Protocol asks for."""
    return {
        "type": type_of(reason),
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "reason": reason,
        "error": detail,
    }


def _problem(status: int, title: str, reason: str, detail: str, code: str) -> Resource:
    body = json.dumps(problem(status, title, reason, detail, code), ensure_ascii=False)
    return {
        "direct_response": {"status": status, "body": {"inline_string": body}},
        "response_headers_to_add": [_header("content-type", "application/problem+json")],
    }


def _refusal(status: int, text: str) -> Resource:
    return {"direct_response": {"status": status, "body": {"inline_string": text}}}


def _header(key: str, value: str) -> Resource:
    return {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
