"""All metrics in one exposition: this process's, the other services', Envoy's and the replicas'."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

import aiohttp
from prometheus_client import Counter

from ekiben.errors import EkibenError
from services.gateway import exposition
from services.gateway.domain import Replica, RouteTable, cluster_of
from services.gateway.exposition import Family
from services.kernel import monitoring
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
"""A replica that is busy must not hold up the page; it is left out, and counted."""
AT_ONCE = 16
MOST_BYTES = 8 << 20
"""A larger page of a replica is left out, and counted."""

failures = Counter("ekiben_scrape_failures_total", "Sources of metrics that did not answer in time, by kind.", ["kind"])
for _kind in ("replica", "service", "envoy"):
    failures.labels(_kind)

_MS = 0.001
_LISTENER = {"envoy_http_conn_manager_prefix": "listener", "envoy_response_code_class": "status_class"}
_CLUSTER = {"envoy_cluster_name": "cluster", "envoy_response_code_class": "status_class"}
ENVOY_FAMILIES: Mapping[str, tuple[str, str, float, Mapping[str, str]]] = {
    "envoy_http_downstream_rq_total": ("ekiben_gateway_requests_total", "Requests that came in.", 1, _LISTENER),
    "envoy_http_downstream_rq_xx": ("ekiben_gateway_responses_total", "Responses by class of status.", 1, _LISTENER),
    "envoy_http_downstream_rq_active": ("ekiben_gateway_requests_in_progress", "Requests being served.", 1, _LISTENER),
    "envoy_http_downstream_rq_time": (
        "ekiben_gateway_request_duration_seconds",
        "Whole time of requests.",
        _MS,
        _LISTENER,
    ),
    "envoy_http_downstream_cx_active": ("ekiben_gateway_connections", "Open connections of callers.", 1, _LISTENER),
    "envoy_cluster_upstream_rq_total": ("ekiben_upstream_requests_total", "Requests sent on.", 1, _CLUSTER),
    "envoy_cluster_upstream_rq_xx": ("ekiben_upstream_responses_total", "Answers by class of status.", 1, _CLUSTER),
    "envoy_cluster_upstream_rq_active": (
        "ekiben_upstream_requests_in_progress",
        "Requests sent on and not answered.",
        1,
        _CLUSTER,
    ),
    "envoy_cluster_upstream_rq_time": (
        "ekiben_upstream_request_duration_seconds",
        "Time until the answer's end.",
        _MS,
        _CLUSTER,
    ),
    "envoy_cluster_upstream_rq_retry": (
        "ekiben_upstream_retries_total",
        "Requests sent to another replica.",
        1,
        _CLUSTER,
    ),
    "envoy_cluster_upstream_cx_connect_fail": (
        "ekiben_upstream_connect_failures_total",
        "Connections refused.",
        1,
        _CLUSTER,
    ),
    "envoy_cluster_membership_healthy": ("ekiben_upstream_endpoints", "Endpoints that get requests.", 1, _CLUSTER),
    "envoy_filesystem_write_failed": (
        "ekiben_capture_write_failures_total",
        "Writes of captures that failed, as on a full disk.",
        1,
        {},
    ),
    "envoy_tracing_opentelemetry_spans_dropped": (
        "ekiben_gateway_spans_dropped_total",
        "Spans of requests that came too fast for each to be traced.",
        1,
        _LISTENER,
    ),
    "envoy_http_lua_errors": (
        "ekiben_capture_script_errors_total",
        "Captures that broke off; the requests went on.",
        1,
        _LISTENER,
    ),
    "envoy_listener_manager_lds_update_rejected": (
        "ekiben_envoy_listeners_rejected_total",
        "Files of listeners that Envoy refused.",
        1,
        {},
    ),
    "envoy_cluster_manager_cds_update_rejected": (
        "ekiben_envoy_clusters_rejected_total",
        "Files of clusters that Envoy refused.",
        1,
        {},
    ),
    "envoy_server_memory_allocated": ("ekiben_envoy_memory_bytes", "Memory that Envoy uses.", 1, {}),
    "envoy_server_uptime": ("ekiben_envoy_uptime_seconds", "How long Envoy has been running.", 1, {}),
}
"""Envoy's families that are shown: our name, help, factor, and labels by Envoy's, as Prometheus asks."""


class Metrics:
    """Renders the page; scrapes of replicas are kept for a while, so that many readers cost no more than one."""

    def __init__(
        self,
        table: Callable[[], RouteTable],
        envoy_page: Callable[[], Awaitable[str]],
        clock: Clock,
        *,
        targets: Sequence[str] = (),
        keep_s: float = 5.0,
    ) -> None:
        """`envoy_page` gives Envoy's own exposition; `targets` are `name=URL` of the other services."""
        self._table = table
        self._envoy_page = envoy_page
        self._clock = clock
        self._targets = dict(target.split("=", 1) for target in targets)
        self._keep_s = keep_s
        self._scraped: list[list[Family]] = []
        self._scraped_at = float("-inf")
        self._lock = asyncio.Lock()

    async def render(self) -> bytes:
        """The page, in Prometheus' text format 0.0.4."""
        async with self._lock:
            if self._clock.monotonic() - self._scraped_at >= self._keep_s:
                self._scraped = await self._scrape()
                self._scraped_at = self._clock.monotonic()
        own = list(exposition.parse(monitoring.render().decode()))
        sources = [own, await self._envoy(), *self._scraped]
        return await asyncio.to_thread(lambda: exposition.write(exposition.merge(sources)))

    async def _scrape(self) -> list[list[Family]]:
        limit = asyncio.Semaphore(AT_ONCE)
        replicas = {(each.service, each.endpoint.replica): each for each in self._table().replicas()}

        async def limited(work: Awaitable[list[Family]]) -> list[Family]:
            async with limit:
                return await work

        return await asyncio.gather(
            *(limited(self._replica(replica)) for replica in replicas.values()),
            *(limited(self._service(name, url)) for name, url in self._targets.items()),
        )

    async def _replica(self, replica: Replica) -> list[Family]:
        labels = {
            "deployment": replica.deployment.rpartition("/")[2],
            "revision": replica.revision.rpartition("/")[2],
            "service": replica.service,
            "replica": replica.endpoint.replica,
        }
        address = replica.endpoint.address
        if address.startswith("unix:"):
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(address.removeprefix("unix:"))
            url = "http://replica/metrics"
        else:
            connector, url = aiohttp.TCPConnector(), f"http://{address}/metrics"
        return await _fetch(url, connector, "replica", labels)

    async def _service(self, name: str, url: str) -> list[Family]:
        return await _fetch(url, aiohttp.TCPConnector(), "service", {"component": name})

    async def _envoy(self) -> list[Family]:
        try:
            page = await self._envoy_page()
        except EkibenError:
            failures.labels("envoy").inc()
            return []
        return list(_renamed(exposition.parse(page), self._clusters()))

    def _clusters(self) -> dict[str, dict[str, str]]:
        """Labels of the clusters of replicas, by name."""
        found = {}
        for route in self._table().routes:
            for target in route.targets:
                revision = target.revision.rpartition("/")[2]
                labels = {
                    "deployment": route.id,
                    "revision": revision,
                    "service": target.service,
                    "target": target.target,
                }
                found[cluster_of(route.deployment, target.target, target.revision)] = labels
            for each in route.internal_routes:
                revision = each.revision.rpartition("/")[2]
                labels = {"deployment": route.id, "revision": revision, "service": each.service, "target": each.target}
                found[cluster_of(route.deployment, each.target, each.revision, each.service)] = labels
        return found


def _renamed(families: Iterable[Family], clusters: Mapping[str, Mapping[str, str]]) -> Iterator[Family]:
    for family in families:
        if family.name not in ENVOY_FAMILIES:
            continue
        name, text, factor, names = ENVOY_FAMILIES[family.name]
        kind = family.type if family.type != "untyped" else "gauge"
        renamed = Family(name, kind, text)
        for sample, labels, value in family.samples:
            shown = dict(exposition.labels_of(labels))
            if shown.get("envoy_http_conn_manager_prefix") == "admin":
                continue
            shown = {names.get(label, label): given for label, given in shown.items()}
            if "status_class" in shown:
                shown["status_class"] += "xx"
            if own := clusters.get(shown.get("cluster", "")):
                del shown["cluster"]
                shown.update(own)
            if factor != 1:
                if sample.endswith("_sum"):
                    value = repr(float(value) * factor)
                if shown.get("le", "+Inf") != "+Inf":
                    shown["le"] = f"{float(shown['le']) * factor:g}"
            suffix = sample.removeprefix(family.name)
            renamed.samples.append((name + suffix, exposition.format_labels(shown), value))
        yield renamed


async def _fetch(url: str, connector: aiohttp.BaseConnector, kind: str, labels: Mapping[str, str]) -> list[Family]:
    """The families of a page with labels added; none where the whole of it does not come in time."""
    page = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT_S), aiohttp.ClientSession(connector=connector) as session:
            async with session.get(url) as answer:
                answer.raise_for_status()
                async for chunk in answer.content.iter_any():
                    page += chunk
                    if len(page) > MOST_BYTES:
                        raise ValueError(f"The page has more than {MOST_BYTES} bytes.")
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
        log.info("metrics are left out", extra={"url": url, **labels, "error": str(exc) or type(exc).__name__})
        failures.labels(kind).inc()
        return []
    return await asyncio.to_thread(_read, bytes(page), labels)


def _read(page: bytes, labels: Mapping[str, str]) -> list[Family]:
    return list(exposition.labelled(exposition.parse(page.decode("utf-8", "replace")), labels))
