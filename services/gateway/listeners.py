"""Listeners, filters and the bootstrap as Envoy's resources.

Source: Envoy 1.40's v3 API: envoy/config/listener/v3, envoy/config/bootstrap/v3,
envoy/extensions/filters/network/http_connection_manager/v3.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from services.gateway.domain import InternalRoute, Route
from services.gateway.messages import TYPES, Resource, file_source
from services.gateway.routes import ADMISSION, ADMISSION_CLUSTER, CAPTURE, internal_routes, type_of

_HCM = f"{TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_SAMPLERS = f"{TYPES}extensions.tracers.opentelemetry.samplers.v3"
_CONNECTIONS = f"{TYPES}extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
_TRUST_NOBODY = {"address_prefix": "255.255.255.255", "prefix_len": 32}
_FROM_OUTSIDE_NEVER = ("ekiben-user", "ekiben-organization", "ekiben-api-token", "ekiben-traceparent")
_FORWARDED = (
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-proto",
    "forwarded",
)
CAPTURE_MODULE = "ekiben_capture"
"""Envoy finds it as `libekiben_capture.so`."""
UNREACHED = ["UH", "UF", "UO", "LR", "UR", "UC", "UT", "URX", "NC", "LH", "UPE", "OM"]
"""Response flags that say that no upstream gave an answer."""
LOST = ["UC", "UR"]
"""Those that say that one had the request, and went before it answered."""
_LOST_DETAIL = "The connection broke before there was an answer; whether the request was carried out is not known."
DRAIN_S = 60
"""Connections of a listener that goes away get so long, with `connection: close` from the start."""


SPANS_INTERVAL_MS = 500
"""How often each of Envoy's workers sends its spans: a trace is readable after about a second. By default Envoy sends
five at a time, which at 1,000 requests per second cost it four times what the requests did, and the recorder more
than a core."""
SPANS_AT_ONCE = 1024
"""Most spans that a worker sends at a time, one for each request. Of more the rest is dropped and counted: the recorder
needs a tenth of a millisecond of a core for each, which a rush of predictions must not lose to their traces."""

SPANS_WAIT_S = 30
"""So long Envoy tries to send spans to a recorder that is away. It keeps no more than 64 KiB for another try, some 85
spans: those of a worker that had more in half a second are sent once."""
SPANS_TRY_S = 10
"""Envoy's longest pause between two tries, and how long it lets each of them take. So spans survive an absence of 20 s,
longer than the recorder takes to start again. Replicas' wait as long."""


@dataclass(frozen=True)
class Plan:
    """What all listeners share."""

    host: str
    port: int
    capture_log: Path
    capture_module: bool = False
    """Whether `capture.c` captures, which was built; else `capture.lua` does."""
    trace_percent: float = 100.0
    trace_cluster: str = ""
    """Where spans go; empty for nowhere."""
    service_token: str = ""
    idle_timeout_s: float = 3600.0
    trusted_hops: int = 0


def public_listener(plan: Plan, routes_file: Path) -> Resource:
    """The listener of the public port."""
    manager = _manager(
        plan, "public", {"rds": {"route_config_name": "public", "config_source": file_source(routes_file)}}
    )
    return _listener("public", _socket(plan.host, plan.port), _at_the_edge(plan, manager))


def own_port_listener(plan: Plan, route: Route, routes_file: Path) -> Resource:
    """The listener of a deployment's own port."""
    name = f"port_{route.id}"
    manager = _manager(
        plan, "deployments", {"rds": {"route_config_name": name, "config_source": file_source(routes_file)}}
    )
    return _listener(name, _socket(plan.host, route.port), _at_the_edge(plan, manager))


def internal_listener(plan: Plan, route: InternalRoute, cluster: str) -> Resource:
    """The listener between the services of a bento: a Unix socket in a folder that only the suite's user may enter.

    Replicas may be containers with a user of their own, which are given the folder: the socket itself is open to all.
    """
    manager = _manager(plan, "internal", {"route_config": internal_routes(cluster, route.service)})
    return _listener(cluster, {"pipe": {"path": route.socket_path, "mode": 0o666}}, manager)


def bootstrap(*, admin_socket: Path, listeners_file: Path, clusters_file: Path) -> Resource:
    """What Envoy starts with. Everything that may change is in the files."""
    return {
        "node": {"id": "gateway", "cluster": "ekiben"},
        "admin": {"address": {"pipe": {"path": str(admin_socket), "mode": 0o600}}},
        "layered_runtime": {
            "layers": [
                {
                    "name": "spans",
                    "static_layer": {
                        "tracing.opentelemetry.flush_interval_ms": SPANS_INTERVAL_MS,
                        "tracing.opentelemetry.min_flush_spans": SPANS_AT_ONCE + 1,  # Never before the interval ends.
                    },
                }
            ]
        },
        "dynamic_resources": {"lds_config": file_source(listeners_file), "cds_config": file_source(clusters_file)},
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": [{"safe_regex": {"regex": _STATISTICS}}]}}},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": _CONNECTIONS,
                        "max_active_downstream_connections": 8000,  # Each may need a second descriptor, of 20,000.
                    },
                }
            ]
        },
    }


_STATISTICS = (
    r"listener_manager\..*|cluster_manager\.(cds\..*|active_clusters|warming_clusters)|filesystem\..*"
    r"|server\.(live|uptime|memory_allocated|memory_heap_size|total_connections|concurrency)"
    r"|http\.[^.]*\.(downstream_(rq|cx)_(total|active|time|[1-5]xx)|rds\..*|tracing\..*)"
    r"|http\.[^.]*\.downstream_rq_(completed|rx_reset|too_large)|http\.[^.]*\.lua\.errors"
    r"|cluster\.[^.]*\.(upstream_rq_(total|active|time|timeout|retry|rx_reset|tx_reset|pending_failure_eject|[1-5]xx)"
    r"|upstream_cx_(total|active|connect_fail|connect_timeout)"
    r"|membership_(healthy|total)|outlier_detection\.ejections_active|version_text|update_(success|rejected|failure))"
    r"|tracing\.opentelemetry\..*"
)
"""What is counted: what `envoy`, `watcher` and `metrics` read. All of Envoy's would be ten times as many."""


def _listener(name: str, address: Resource, manager: Resource) -> Resource:
    return {
        "@type": f"{TYPES}config.listener.v3.Listener",
        "name": name,
        "address": address,
        # With it a second Envoy could share the port in silence, instead of being refused.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _socket(host: str, port: int) -> Resource:
    return {"socket_address": {"address": host, "port_value": port}}


def _manager(plan: Plan, prefix: str, routes: Resource) -> Resource:
    """An HTTP connection manager between services that trust one another."""
    manager: Resource = {
        "@type": _HCM,
        "stat_prefix": prefix,
        "codec_type": "AUTO",
        **routes,
        "http_filters": [_router()],
        "http_protocol_options": {"accept_http_10": True, "default_host_for_http_10": "localhost"},
        "http2_protocol_options": {
            "initial_stream_window_size": 1 << 20,
            "initial_connection_window_size": 16 << 20,
            "max_concurrent_streams": 1000,
            "allow_connect": True,
        },
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "max_request_headers_kb": 96,
        "common_http_protocol_options": {"max_headers_count": 1000, "idle_timeout": "3600s"},
        "stream_idle_timeout": f"{plan.idle_timeout_s:g}s",
        "server_header_transformation": "PASS_THROUGH",
        "generate_request_id": True,
        "request_id_extension": {
            "typed_config": {
                "@type": f"{TYPES}extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
                "use_request_id_for_trace_sampling": True,  # Without it each request is traced.
            }
        },
        "local_reply_config": _local_replies(),
    }
    if plan.trace_cluster:
        manager["tracing"] = _tracing(plan)
    return manager


def _at_the_edge(plan: Plan, manager: Resource) -> Resource:
    """What a port that anybody may reach has besides: nothing that a caller says of itself is believed."""
    lies = _FROM_OUTSIDE_NEVER if plan.trusted_hops else (*_FROM_OUTSIDE_NEVER, *_FORWARDED)
    return {
        **manager,
        "use_remote_address": True,
        "xff_num_trusted_hops": plan.trusted_hops,
        "internal_address_config": {"cidr_ranges": [_TRUST_NOBODY]},
        "always_set_request_id_in_response": True,
        "strip_trailing_host_dot": True,
        "request_headers_timeout": "60s",
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {
                    "@type": f"{TYPES}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [*({"remove": header} for header in lies), *_valid_parent_only()],
                },
            }
        ],
        "http_filters": [_admission(), _capture(plan), _router()],
        "access_log": [_capture_log(plan.capture_log)],
    }


def _valid_parent_only() -> list[Resource]:
    """Takes a `traceparent` out that is none: Envoy would make no span at all, where a new trace is asked for.

    Source: W3C Trace Context, 3.2. Of a later version than 00 a new trace is begun, too: Envoy does not read it.
    """
    sent = "request.headers['traceparent']"
    # Not one expression for the whole: its repetitions are more than Envoy lets an expression have.
    valid = (
        f"'traceparent' in request.headers && size({sent}) == 55 && {sent}.matches('^00(-[0-9A-Fa-f]+){{3}}$')"
        f" && !{sent}.contains('-{'0' * 32}-') && !{sent}.contains('-{'0' * 16}-')"
    )

    def put(header: str, value: str) -> Resource:  # An empty value puts nothing.
        return {"append": {"header": {"key": header, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}

    return [
        put("ekiben-traceparent", f"%CEL({valid} ? {sent} : '')%"),
        {"remove": "traceparent"},
        put("traceparent", "%REQ(EKIBEN-TRACEPARENT)%"),
        {"remove": "ekiben-traceparent"},
    ]


def _router() -> Resource:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{TYPES}extensions.filters.http.router.v3.Router", "suppress_envoy_headers": True},
    }


def _capture(plan: Plan) -> Resource:
    module = {
        "@type": f"{TYPES}extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter",
        "dynamic_module_config": {"name": CAPTURE_MODULE},
        "filter_name": "capture",
    }
    script = {
        "@type": f"{TYPES}extensions.filters.http.lua.v3.Lua",
        "default_source_code": {"inline_string": capture_script()},
    }
    return {
        "name": CAPTURE,
        "disabled": True,  # Deployments switch it on.
        "typed_config": module if plan.capture_module else script,
    }


def capture_script() -> str:
    """The source of `capture.lua`."""
    return resources.files(__package__).joinpath("capture.lua").read_text()


def _admission() -> Resource:
    """Asks `admission` over HTTP. Its answer's `ekiben-api-token` goes into metadata, for the capture only."""
    return {
        "name": ADMISSION,
        "disabled": True,  # Deployments that ask for a token switch it on.
        "typed_config": {
            "@type": f"{TYPES}extensions.filters.http.ext_authz.v3.ExtAuthz",
            "transport_api_version": "V3",
            "failure_mode_allow": False,
            "status_on_error": {"code": "ServiceUnavailable"},
            "allowed_headers": {"patterns": [{"exact": "authorization"}, {"exact": "x-yatai-api-token"}]},
            "http_service": {
                "server_uri": {"uri": "http://admission", "cluster": ADMISSION_CLUSTER, "timeout": "10s"},
                "path_prefix": "/admission",
                "authorization_response": {
                    "allowed_client_headers": {"patterns": [{"exact": "www-authenticate"}, {"exact": "content-type"}]},
                    "dynamic_metadata_from_headers": {"patterns": [{"exact": "ekiben-api-token"}]},
                },
            },
        },
    }


def _capture_log(path: Path) -> Resource:
    """One JSON line for each request that the capture script marked. `captures` reads it."""
    return {
        "name": "envoy.access_loggers.file",
        "filter": {
            "metadata_filter": {
                "matcher": {"filter": "cap", "path": [{"key": "qh"}], "value": {"present_match": True}},
                "match_if_key_not_found": False,
            }
        },
        "typed_config": {
            "@type": f"{TYPES}extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {
                "json_format": {
                    "id": "%REQ(X-REQUEST-ID)%",
                    "start": "%START_TIME(%s.%6f)%",
                    "us": "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%",
                    "rx": "%COMMON_DURATION(DS_RX_BEG:DS_RX_END:us)%",
                    "fb": "%COMMON_DURATION(DS_RX_BEG:DS_TX_BEG:us)%",
                    "ms": "%DURATION%",
                    "method": "%REQ(:METHOD)%",
                    "host": "%REQ(:AUTHORITY)%",
                    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
                    "protocol": "%PROTOCOL%",
                    "status": "%RESPONSE_CODE%",
                    "flags": "%RESPONSE_FLAGS%",
                    "trace": "%TRACE_ID%",
                    "parent": "%REQ(TRACEPARENT)%",
                    "peer": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
                    "received": "%BYTES_RECEIVED%",
                    "sent": "%BYTES_SENT%",
                    "facts": "%METADATA(CLUSTER:ekiben:facts)%",
                    "replica": "%METADATA(UPSTREAM_HOST:ekiben:replica)%",
                    "token": f"%DYNAMIC_METADATA({ADMISSION}:ekiben-api-token)%",
                    **{key: f"%DYNAMIC_METADATA(cap:{key})%" for key in ("qh", "q0", "sh", "s0")},
                    "more": "%DYNAMIC_METADATA(cap.more)%",
                }
            },
        },
    }


def _tracing(plan: Plan) -> Resource:
    return {
        "random_sampling": {"value": 100},  # Less would also drop what a caller has decided to trace.
        # One span for each request: a second, for the way on, would cost Envoy half as much as routing does, and says
        # little that the span of whoever answers does not.
        "spawn_upstream_span": False,
        # `POST deployments/iris/predict`, `GET /v1/models`, `POST /ekiben.registry.v1.Models/GetModel`.
        "operation": "%REQ(:METHOD)% %METADATA(ROUTE:ekiben:named)%%PATH(NQ)%",
        "custom_tags": [
            _tag("ekiben.deployment", "route", "named"),
            _tag("ekiben.replica", "host", "replica"),
            {"tag": "ekiben.request_id", "request_header": {"name": "x-request-id"}},
            # Instead of Envoy's own, which has the query: codes of logins, signatures of URLs, inputs of predictions.
            # Whoever may read traces may not have those.
            {"tag": "http.url", "value": "%REQ(:SCHEME)%://%REQ(:AUTHORITY)%%PATH(NQ)%"},
        ],
        "max_path_tag_length": 256,
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": f"{TYPES}config.trace.v3.OpenTelemetryConfig",
                "service_name": "gateway",
                "max_cache_size": SPANS_AT_ONCE,
                "sampler": {
                    "name": "envoy.tracers.opentelemetry.samplers.parent_based",
                    "typed_config": {
                        "@type": f"{_SAMPLERS}.ParentBasedSamplerConfig",
                        "wrapped_sampler": {
                            "name": "envoy.tracers.opentelemetry.samplers.trace_id_ratio_based",
                            "typed_config": {
                                "@type": f"{_SAMPLERS}.TraceIdRatioBasedSamplerConfig",
                                "sampling_percentage": {
                                    "numerator": round(plan.trace_percent * 10_000),
                                    "denominator": "MILLION",
                                },
                            },
                        },
                    },
                },
                "grpc_service": {
                    "envoy_grpc": {"cluster_name": plan.trace_cluster},
                    "timeout": f"{SPANS_WAIT_S}s",
                    "retry_policy": {
                        "retry_on": "connect-failure,reset-before-request,unavailable",
                        "num_retries": 1000,
                        "retry_back_off": {"base_interval": "0.5s", "max_interval": f"{SPANS_TRY_S}s"},
                    },
                    "initial_metadata": [{"key": "authorization", "value": f"Bearer {plan.service_token}"}],
                },
            },
        },
    }


def _tag(tag: str, kind: str, key: str) -> Resource:
    return {"tag": tag, "metadata": {"kind": {kind: {}}, "metadata_key": {"key": "ekiben", "path": [{"key": key}]}}}


def _local_replies() -> Resource:
    """Envoy's own answers as problems, but to gRPC callers, who get a status in its own form."""
    from_route = {key: f"%METADATA(ROUTE:ekiben:{key})%" for key in ("type", "reason", "detail")}
    return {
        "mappers": [
            _mapper(
                {"and_filter": {"filters": [_flags(LOST), _not_grpc()]}},
                {
                    "type": type_of("CONNECTION_LOST"),
                    "title": "Service unavailable",
                    "status": "%RESPONSE_CODE%",
                    "code": "UNAVAILABLE",
                    "reason": "CONNECTION_LOST",
                    "detail": _LOST_DETAIL,
                    "error": _LOST_DETAIL,
                    "flags": "%RESPONSE_FLAGS%",
                    "instance": "urn:uuid:%REQ(X-REQUEST-ID)%",
                },
            ),
            _mapper(
                {"and_filter": {"filters": [_flags(UNREACHED), _not_grpc()]}},
                {
                    "title": "Service unavailable",
                    "status": "%RESPONSE_CODE%",
                    "code": "UNAVAILABLE",
                    "error": from_route["detail"],
                    "flags": "%RESPONSE_FLAGS%",
                    "instance": "urn:uuid:%REQ(X-REQUEST-ID)%",
                    **from_route,
                },
            ),
            _mapper(
                {"and_filter": {"filters": [_flags(["UAEX"]), _status(503), _not_grpc()]}},
                {
                    "type": type_of("ADMISSION_UNAVAILABLE"),
                    "title": "Service unavailable",
                    "status": "%RESPONSE_CODE%",
                    "code": "UNAVAILABLE",
                    "reason": "ADMISSION_UNAVAILABLE",
                    "detail": "The API token cannot be checked now.",
                    "error": "The API token cannot be checked now.",
                    "instance": "urn:uuid:%REQ(X-REQUEST-ID)%",
                },
            ),
        ]
    }


def _mapper(filter: Resource, body: Resource) -> Resource:
    return {
        "filter": filter,
        "body_format_override": {"json_format": body, "content_type": "application/problem+json"},
    }


def _flags(flags: list[str]) -> Resource:
    return {"response_flag_filter": {"flags": flags}}


def _status(code: int) -> Resource:
    comparison = {"op": "EQ", "value": {"default_value": code, "runtime_key": "ekiben.unset"}}
    return {"status_code_filter": {"comparison": comparison}}


def _not_grpc() -> Resource:
    header = {"name": "content-type", "string_match": {"prefix": "application/grpc"}, "invert_match": True}
    return {"header_filter": {"header": {**header, "treat_missing_header_as_empty": True}}}
