"""The Kubernetes API, as far as the runtime needs it: server-side apply, deletion, watches that keep a cache, logs.

Nothing but `apply` writes fields, as the field manager `ekiben`, and never by force: a field that somebody else owns
stays his, and is an error that names him.

Source: kubernetes.io/docs/reference/using-api: server-side-apply; api-concepts, "Efficient detection of changes".
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes_asyncio import client, config

from ekiben.errors import (
    Aborted,
    EkibenError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from services.deployer.runtimes.kubernetes.names import FIELD_MANAGER, Object
from services.kernel.clock import Clock
from services.kernel.settings import SettingsError

log = logging.getLogger(__name__)

_PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Service": "/api/v1/namespaces/{}/services",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Event": "/api/v1/namespaces/{}/events",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Ingress": "/apis/networking.k8s.io/v1/namespaces/{}/ingresses",
    "HTTPRoute": "/apis/gateway.networking.k8s.io/v1/namespaces/{}/httproutes",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
}
_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=5)
_WATCH_S = 300
"""The server ends a watch after so long; it goes on from where it was."""
_PAUSES_S = (0.2, 1.0, 3.0, 10.0)


class Api:
    """Calls to one cluster, in one namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._api, self._namespace = api, namespace

    async def apply(self, made: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply. Gives the object as it then is.

        Raises:
            FailedPrecondition: somebody else owns a field (FIELD_OWNED), or the namespace is not there.
            InvalidArgument: the cluster refuses it for what it says (KUBERNETES_REFUSED), in the cluster's words.
            ResourceExhausted: a quota of the namespace is used up (KUBERNETES_QUOTA).
            PermissionDenied, Unauthenticated: the credentials may not do this.
            Unavailable: the API server does not answer.
        """
        url = f"{_PATHS[made['kind']].format(self._namespace)}/{made['metadata']['name']}"
        query = [("fieldManager", FIELD_MANAGER), ("force", "false"), ("fieldValidation", "Strict")]
        query += [("dryRun", "All")] if dry_run else []
        # JSON is YAML.
        return await self._call("PATCH", url, query, made, content_type="application/apply-patch+yaml")

    async def delete(self, kind: str, name: str) -> None:
        """Delete an object and, in the background, what it owns. One that is not there is passed over."""
        with contextlib.suppress(NotFound):
            await self._call(
                "DELETE", f"{_PATHS[kind].format(self._namespace)}/{name}", [("propagationPolicy", "Background")]
            )

    async def listed(self, kind: str, selector: str, *, fields: str = "") -> tuple[list[Object], str]:
        """All objects with these labels and these `fields`, and the version of the list."""
        found: list[Object] = []
        token = ""
        while True:
            query = [*_selected(selector, fields), ("limit", "500"), *([("continue", token)] if token else [])]
            page = await self._call("GET", _PATHS[kind].format(self._namespace), query)
            found += page["items"]
            token = page["metadata"].get("continue") or ""
            if not token:
                return found, page["metadata"]["resourceVersion"]

    async def watch(self, kind: str, selector: str, version: str) -> AsyncIterator[tuple[str, Object]]:
        """What happens to them after a version: ADDED, MODIFIED, DELETED or BOOKMARK, and the object.

        Raises:
            Aborted: the cluster does not remember that version any more (WATCH_EXPIRED); list anew.
        """
        query = [
            *_selected(selector, ""),
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version),
            ("timeoutSeconds", str(_WATCH_S)),
        ]
        timeout = aiohttp.ClientTimeout(total=None, connect=5, sock_read=_WATCH_S + 30)
        async with self._opened("GET", _PATHS[kind].format(self._namespace), query, timeout=timeout) as response:
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    if event["object"].get("code") == 410:
                        raise Aborted("The watch must begin anew.", reason="WATCH_EXPIRED")
                    raise Unavailable(f"A watch ended: {event['object'].get('message')}.", reason="KUBERNETES_AWAY")
                yield event["type"], event["object"]

    async def log(
        self, pod: str, container: str, *, tail: int, follow: bool = False, previous: bool = False
    ) -> AsyncIterator[bytes]:
        """Lines that a container printed, each begun by a time; nothing where there is no such container."""
        query = [("container", container), ("timestamps", "true")]
        query += [("tailLines", str(tail))] if tail >= 0 else []
        query += [("follow", "true")] if follow else []
        query += [("previous", "true")] if previous else []
        timeout = aiohttp.ClientTimeout(total=None, connect=5, sock_read=None if follow else 30)
        url = f"{_PATHS['Pod'].format(self._namespace)}/{pod}/log"
        with contextlib.suppress(NotFound, InvalidArgument):  # The container has not begun, or is gone.
            async with self._opened("GET", url, query, timeout=timeout) as response:
                async for line in response.content:
                    yield line.rstrip(b"\n")

    async def _call(
        self,
        method: str,
        url: str,
        query: list[tuple[str, str]],
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        async with self._opened(method, url, query, body, content_type) as response:
            try:
                found: Object = await response.json()
            except (aiohttp.ClientError, TimeoutError) as exc:
                raise _away(exc) from exc
            return found

    @asynccontextmanager
    async def _opened(
        self,
        method: str,
        url: str,
        query: list[tuple[str, str]],
        body: Object | None = None,
        content_type: str = "application/json",
        timeout: aiohttp.ClientTimeout = _TIMEOUT,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        await self._api.update_params_for_auth(headers, query, ["BearerToken"])
        session: aiohttp.ClientSession = self._api.rest_client.pool_manager
        data = json.dumps(body).encode() if body is not None else None
        target = f"{self._api.configuration.host}{url}"
        try:
            async with session.request(
                method, target, params=query, headers=headers, data=data, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise _error(response.status, await response.text(), body)
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise _away(exc) from exc


class Cache:
    """All objects of a kind with these labels, kept by a watch: asking it costs no call."""

    def __init__(self, api: Api, kind: str, selector: str, changed: Callable[[], None], clock: Clock) -> None:
        self._api, self._kind, self._selector = api, kind, selector
        self._changed, self._clock = changed, clock
        self.objects: dict[str, Object] = {}
        """By name. Not to be changed by who reads them."""
        self.filled = asyncio.Event()
        """Set once the first list has come."""
        self.fault = ""
        """Why it is not up to date, in words; empty while it is."""

    async def run(self) -> None:
        """Keep it, for ever."""
        version, failures = "", 0
        while True:
            try:
                if not version:
                    items, version = await self._api.listed(self._kind, self._selector)
                    self.objects = {item["metadata"]["name"]: item for item in items}
                    self.filled.set()
                    self._changed()
                async for event, item in self._api.watch(self._kind, self._selector, version):
                    version, failures = item["metadata"]["resourceVersion"], 0
                    if self.fault:
                        self.fault = ""
                        self._changed()
                    self._take(event, item)
                self.fault = ""
            except Aborted:
                version = ""
            except EkibenError as exc:
                if not self.fault:
                    log.warning("a watch was lost", extra={"kind": self._kind, "error": exc.message})
                self.fault = exc.message
                self._changed()
                await self._clock.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1

    def _take(self, event: str, item: Object) -> None:
        name = item["metadata"].get("name", "")
        if event == "BOOKMARK":
            return
        if event == "DELETED":
            self.objects.pop(name, None)
        else:
            self.objects[name] = item
        self._changed()


@asynccontextmanager
async def open_api(kubeconfig: Path | None, context: str, namespace: str) -> AsyncIterator[Api]:
    """The API of the cluster that a kubeconfig names, or of the one in which this process is a pod.

    Raises:
        SettingsError: there is no such file or context, or this is no pod.
    """
    settings = client.Configuration()
    try:
        if kubeconfig is not None:
            await config.load_kube_config(str(kubeconfig), context=context or None, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as exc:
        raise SettingsError(
            [
                f"runtime is kubernetes, and there is no way to a cluster: {exc}. Set kubeconfig to a file that "
                "kubectl works with, or run this service in a pod with a service account."
            ]
        ) from exc
    async with client.ApiClient(settings) as api:
        yield Api(api, namespace)


def _selected(labels: str, fields: str) -> list[tuple[str, str]]:
    return [*([("labelSelector", labels)] if labels else []), *([("fieldSelector", fields)] if fields else [])]


def _error(status: int, text: str, body: Object | None) -> EkibenError:
    try:
        answer: Mapping[str, Any] = json.loads(text)
        message = str(answer.get("message") or text)
    except ValueError:
        answer, message = {}, text[:300]
    what = f"{body['kind']} {body['metadata']['name']}" if body else "the request"
    if status == 401:
        return Unauthenticated(
            f"The cluster does not know these credentials: {message}", reason="KUBERNETES_CREDENTIALS"
        )
    if status == 403 and "exceeded quota" in message:
        return ResourceExhausted(f"The cluster has no room for {what}: {message}", reason="KUBERNETES_QUOTA")
    if status == 403:
        return PermissionDenied(
            f"The cluster does not allow {what}: {message}. Give the deployer's role that right.",
            reason="KUBERNETES_DENIED",
        )
    if status == 404:
        return NotFound(f"The cluster has no such thing: {message}", reason="KUBERNETES_NOT_FOUND")
    if status == 409:
        return FailedPrecondition(f"A field of {what} is somebody else's: {message}", reason="FIELD_OWNED")
    if status == 410:
        return Aborted("The watch must begin anew.", reason="WATCH_EXPIRED")
    if status == 429 or status >= 500:
        return Unavailable(f"The cluster's API has trouble: {message}", reason="KUBERNETES_AWAY")
    return InvalidArgument(f"The cluster refuses {what}: {message}", reason="KUBERNETES_REFUSED")


def _away(exc: BaseException) -> Unavailable:
    return Unavailable(
        f"The cluster's API does not answer ({exc or type(exc).__name__}). What runs there goes on.",
        reason="KUBERNETES_AWAY",
    )
