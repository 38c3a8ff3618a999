"""The Kubernetes API, as far as the runtime needs it: server-side apply, deletion, watches, logs.

Nothing but `apply` writes fields, as the field manager `ekiben`: a field that somebody else owns stays his, and is an
error that names him.

Source: kubernetes.io/docs/reference/using-api: server-side-apply; api-concepts, "Efficient detection of changes".
"""

import asyncio
import contextlib
import json
import re
import socket as sockets
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

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
from services.deployer.runtimes.kubernetes.library import client, config
from services.deployer.runtimes.kubernetes.names import FIELD_MANAGER, Object
from services.kernel.settings import SettingsError

_PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "Service": "/api/v1/namespaces/{}/services",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Event": "/api/v1/namespaces/{}/events",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Ingress": "/apis/networking.k8s.io/v1/namespaces/{}/ingresses",
    "HTTPRoute": "/apis/gateway.networking.k8s.io/v1/namespaces/{}/httproutes",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
}
_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=5)
_WATCH_S = 3600
"""The server ends a watch after so long; it goes on from where it was."""
_OWNER = re.compile(r'conflict with "([^"]*)"')
_SILENT_S = 180
"""A bookmark comes each minute, so a connection that is silent for longer is dead, or nothing was to be told."""
_DENIED = re.compile(r'[Uu]ser "[^"]*" cannot \w+ resource ')
"""What is forbidden to these credentials; admission says forbidden too of what it takes from nobody."""
_NO_NAMESPACE = re.compile(r'namespaces "([^"]*)" not found')
_CHANNELS = "v5.channel.k8s.io"
_HEARTBEAT_S = 20.0
"""A terminal in which nothing happens is not cut off on the way. Whether it is answered says nothing: while a command
does not read what it is sent, the server reads nothing either. That the other side is there, the kernel asks."""
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 3))


class Api:
    """Calls to one cluster, in one namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._api, self._namespace = api, namespace

    async def apply(
        self, made: Object, *, dry_run: bool = False, manager: str = FIELD_MANAGER, force: bool = False
    ) -> Object:
        """Server-side apply. Gives the object as it then is.

        `force` takes fields from their owners: only for those that we lent ourselves, at a version that was looked at.

        Raises:
            FailedPrecondition: somebody else owns a field (FIELD_OWNED), or somebody deletes the namespace.
            NotFound: the namespace is not there.
            Aborted: it is not of the version any more that it names (KUBERNETES_CHANGED).
            InvalidArgument: the cluster refuses it for what it says (KUBERNETES_REFUSED), in the cluster's words.
            ResourceExhausted: a quota of the namespace is used up (KUBERNETES_QUOTA).
            PermissionDenied, Unauthenticated: the credentials may not do this.
            Unavailable: the API server does not answer.
        """
        url = f"{_PATHS[made['kind']].format(self._namespace)}/{made['metadata']['name']}"
        query = [("fieldManager", manager), ("force", str(force).lower()), ("fieldValidation", "Strict")]
        query += [("dryRun", "All")] if dry_run else []
        # JSON is YAML.
        return await self._call("PATCH", url, query, made, content_type="application/apply-patch+yaml")

    async def try_create(self, made: Object) -> None:
        """Ask whether an object could be made, without making it. Raises what `apply` raises."""
        query = [("dryRun", "All"), ("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict")]
        await self._call("POST", _PATHS[made["kind"]].format(self._namespace), query, made)

    async def read(self, kind: str, name: str) -> Object:
        """One object. Raises NotFound where it is not there, and what `apply` raises."""
        return await self._call("GET", f"{_PATHS[kind].format(self._namespace)}/{name}", [])

    async def delete(self, kind: str, name: str) -> None:
        """Delete an object and, in the background, what it owns. One that is not there is passed over."""
        with contextlib.suppress(NotFound):
            await self._call(
                "DELETE", f"{_PATHS[kind].format(self._namespace)}/{name}", [("propagationPolicy", "Background")]
            )

    async def get(self, kind: str, name: str) -> Object:
        """One object, with its managed fields. Raises NotFound."""
        return await self._call("GET", f"{_PATHS[kind].format(self._namespace)}/{name}", [])

    async def version(self) -> str:
        """Of Kubernetes: `v1.36.3`. Raises as `apply` does."""
        return str((await self._call("GET", "/version", [])).get("gitVersion"))

    async def has_namespace(self) -> bool:
        """Whether the namespace is there; true where these credentials cannot find out. Else raises as `apply` does.

        Namespaces are of the cluster, and a Role lets nobody read them: hence a Secret is made, without making it.
        """
        probe = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"ekiben-{uuid.uuid4()}"}}
        try:
            await self.try_create(probe)
        except NotFound as error:
            return error.reason != "NAMESPACE_NOT_FOUND"
        except (FailedPrecondition, InvalidArgument, PermissionDenied, ResourceExhausted):
            pass  # By the namespace's rights, quotas or policies, which it would not have if it were not there.
        return True

    async def rules(self) -> list[Object]:
        """What these credentials may do in the namespace. Raises as `apply` does."""
        asked = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "metadata": {"name": "rules"},
            "spec": {"namespace": self._namespace},
        }
        answer = await self._call("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", [], asked)
        found: list[Object] = answer["status"]["resourceRules"]
        return found

    async def listed(
        self, kind: str, selector: str, *, fields: str = "", kept: Callable[[Object], Object] = lambda item: item
    ) -> tuple[list[Object], str]:
        """All objects with these labels and these `fields`, as far as they are `kept`, and the version of the list."""
        found: list[Object] = []
        token = ""
        while True:
            query = [*_selected(selector, fields), ("limit", "500"), *([("continue", token)] if token else [])]
            page = await self._call("GET", _PATHS[kind].format(self._namespace), query)
            found += map(kept, page["items"])
            token = page["metadata"].get("continue") or ""
            if not token:
                return found, page["metadata"]["resourceVersion"]

    async def newest(self, kind: str) -> str:
        """The version of the cluster now."""
        page = await self._call("GET", _PATHS[kind].format(self._namespace), [("limit", "1")])
        return str(page["metadata"]["resourceVersion"])

    async def watch(
        self, kind: str, selector: str, version: str, opened: Callable[[], None] = lambda: None
    ) -> AsyncIterator[tuple[str, Object]]:
        """What happens to them after a version: ADDED, MODIFIED, DELETED or BOOKMARK, and the object. `opened` is
        called once the cluster has taken the watch, as it may be silent for long.

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
        timeout = aiohttp.ClientTimeout(total=None, connect=5, sock_read=_SILENT_S)
        async with self._opened("GET", _PATHS[kind].format(self._namespace), query, timeout=timeout) as response:
            opened()
            async for line in _lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    if event["object"].get("code") == 410:
                        raise Aborted("The watch must begin anew.", reason="WATCH_EXPIRED")
                    raise Unavailable(f"A watch ended: {event['object'].get('message')}.", reason="KUBERNETES_AWAY")
                yield event["type"], event["object"]

    async def log(
        self,
        pod: str,
        container: str,
        *,
        tail: int,
        since: datetime | None = None,
        follow: bool = False,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        """Lines that a container printed, each begun by a time; nothing where there is no such container.

        `since` is rounded down to a second.
        """
        query = [("container", container), ("timestamps", "true")]
        query += [("tailLines", str(tail))] if tail >= 0 else []
        query += [("sinceTime", since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))] if since else []
        query += [("follow", "true")] if follow else []
        query += [("previous", "true")] if previous else []
        timeout = aiohttp.ClientTimeout(total=None, connect=5, sock_read=None if follow else 30)
        url = f"{_PATHS['Pod'].format(self._namespace)}/{pod}/log"
        with contextlib.suppress(NotFound, InvalidArgument):  # The container has not begun, or is gone.
            async with self._opened("GET", url, query, timeout=timeout) as response:
                async for line in response.content:
                    yield line.rstrip(b"\n")

    async def debug(self, pod: str, container: Object) -> None:
        """Put an ephemeral container into a pod. By a merge: it stays as long as the pod, and is never applied again.

        Raises as `apply` does.
        """
        url = f"{_PATHS['Pod'].format(self._namespace)}/{pod}/ephemeralcontainers"
        query = [("fieldManager", f"{FIELD_MANAGER}-debug"), ("fieldValidation", "Strict")]
        change = {"kind": "Pod", "metadata": {"name": pod}, "spec": {"ephemeralContainers": [container]}}
        await self._call("PATCH", url, query, change, content_type="application/strategic-merge-patch+json")

    @asynccontextmanager
    async def connected(
        self, pod: str, verb: str, query: list[tuple[str, str]]
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A WebSocket to `exec` in or `attach` to a container of a pod, by `v5.channel.k8s.io`.

        Raises as `apply` does; FailedPrecondition too where the cluster is older than 1.30 (KUBERNETES_TOO_OLD).
        """
        headers: dict[str, str] = {}
        await self._api.update_params_for_auth(headers, query, ["BearerToken"])
        session: aiohttp.ClientSession = self._api.rest_client.pool_manager
        url = f"{self._api.configuration.host}{_PATHS['Pod'].format(self._namespace)}/{pod}/{verb}"
        about = {"kind": f"pods/{verb}", "metadata": {"name": pod}}
        try:
            async with session.ws_connect(
                url, params=query, headers=headers, protocols=(_CHANNELS,), max_msg_size=0
            ) as socket:
                if socket.protocol != _CHANNELS:
                    raise FailedPrecondition(
                        "The cluster is too old for terminals, which need Kubernetes 1.30 or later.",
                        reason="KUBERNETES_TOO_OLD",
                    )
                async with _beating(socket):
                    yield socket
        except aiohttp.WSServerHandshakeError as exc:
            raise _error(exc.status, await self._refusal(exc.status, url, query, headers), about) from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise _away(exc) from exc

    async def _refusal(self, status: int, url: str, query: list[tuple[str, str]], headers: Mapping[str, str]) -> str:
        """Why a WebSocket was refused: a handshake does not give what was answered, but the same is answered to a GET,
        which runs nothing."""
        session: aiohttp.ClientSession = self._api.rest_client.pool_manager
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with session.get(url, params=query, headers=headers, timeout=_TIMEOUT) as response:
                if response.status == status:
                    return await response.text()
        # To be allowed to get it is not enough since Kubernetes 1.35.
        verb = url.rpartition("/")[2]
        return (
            f'User "of these credentials" cannot create resource "pods/{verb}"' if status == 403 else f"HTTP {status}"
        )

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
            except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
                raise _away(exc) from exc
            # Every answer here is an object with a kind, but for what the server says of its version.
            if not isinstance(found, dict) or not (found.keys() & {"kind", "gitVersion"}):
                raise Unavailable(
                    f"What answers at {self._api.configuration.host} is no Kubernetes: name its API server.",
                    reason="KUBERNETES_AWAY",
                )
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


@asynccontextmanager
async def _beating(socket: aiohttp.ClientWebSocketResponse) -> AsyncIterator[None]:
    """Show signs of life on a connection, and have the kernel look for the other side's."""
    if (connection := socket.get_extra_info("socket")) is not None:
        connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(sockets, name):
                connection.setsockopt(sockets.IPPROTO_TCP, getattr(sockets, name), value)

    async def beat() -> None:
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # Whoever reads it hears of that.
            while True:
                await asyncio.sleep(_HEARTBEAT_S)
                await socket.ping()

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])


@asynccontextmanager
async def open_api(kubeconfig: Path | Mapping[str, Any] | None, context: str, namespace: str) -> AsyncIterator[Api]:
    """The API of the cluster that a kubeconfig (its file, or what is in it) names, or of the one in which this process
    is a pod.

    Raises:
        SettingsError: there is no such file or context, or this is no pod.
    """
    settings = client.Configuration()
    try:
        if isinstance(kubeconfig, Mapping):
            await config.load_kube_config_from_dict(dict(kubeconfig), client_configuration=settings)
        elif kubeconfig is not None:
            await config.load_kube_config(str(kubeconfig), context=context or None, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        opened = client.ApiClient(settings)  # Which reads certificates and keys.
    except (config.ConfigException, OSError, ValueError, TypeError) as exc:
        raise SettingsError(
            [
                f"runtime is kubernetes, and there is no way to a cluster: {str(exc).rstrip('.')}. Set kubeconfig to a "
                "file that kubectl works with, or run this service in a pod with a service account."
            ]
        ) from exc
    async with opened as api:
        yield Api(api, namespace)


def _selected(labels: str, fields: str) -> list[tuple[str, str]]:
    return [*([("labelSelector", labels)] if labels else []), *([("fieldSelector", fields)] if fields else [])]


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines until the server ends them or is silent. An object may be longer than the limit of a reader's line."""
    rest = b""
    with contextlib.suppress(aiohttp.SocketTimeoutError):
        async for chunk in response.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line


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
    if status == 403 and "is being terminated" in message:
        return FailedPrecondition(
            f"Somebody deletes the namespace, so that {what} cannot be made; it is made once the namespace is there "
            f"again: {message}",
            reason="NAMESPACE_TERMINATING",
        )
    if status == 403 and _DENIED.search(message):
        return PermissionDenied(
            f"The cluster does not allow {what}: {message}. Give the deployer's role that right.",
            reason="KUBERNETES_DENIED",
        )
    if status == 404 and (found := _NO_NAMESPACE.search(message)):
        return NotFound(
            f"There is no namespace {found[1]} in the cluster: make it (kubectl create namespace {found[1]}), or name "
            "another. What is asked here is applied once it is there.",
            reason="NAMESPACE_NOT_FOUND",
            namespace=found[1],
        )
    if status == 404:
        return NotFound(f"The cluster has no such thing: {message}", reason="KUBERNETES_NOT_FOUND")
    if status == 409:
        return _conflict(what, answer, message)
    if status == 410:
        return Aborted("The watch must begin anew.", reason="WATCH_EXPIRED")
    # An apply with a field that the cluster does not know ends as if the cluster were broken.
    if status == 429 or (status >= 500 and "failed to create typed patch object" not in message):
        return Unavailable(f"The cluster's API has trouble: {message}", reason="KUBERNETES_AWAY")
    return InvalidArgument(f"The cluster refuses {what}: {message}", reason="KUBERNETES_REFUSED")


def _conflict(what: str, answer: Mapping[str, Any], message: str) -> EkibenError:
    """Whose the fields are. `owners` and `fields` are words joined by commas."""
    causes = [
        each
        for each in (answer.get("details") or {}).get("causes") or ()
        if each.get("reason") == "FieldManagerConflict"
    ]
    if not causes:  # Of a version that is not the newest any more.
        return Aborted(f"{what} changed meanwhile: {message}", reason="KUBERNETES_CHANGED")
    fields = [str(each.get("field") or "") for each in causes]
    owners = [found[1] for each in causes if (found := _OWNER.search(str(each.get("message") or "")))]
    said = ", ".join(dict.fromkeys(f"{field} of {owner}" for field, owner in zip(fields, owners, strict=False)))
    return FailedPrecondition(
        f"A field of {what} is somebody else's: {said or message}. It is left to its owner; what is asked here is "
        "applied again once he gives it up, or deletes the object, which is then made anew.",
        reason="FIELD_OWNED",
        owners=",".join(dict.fromkeys(owners)),
        fields=",".join(dict.fromkeys(fields)),
    )


def _away(exc: BaseException) -> Unavailable:
    return Unavailable(
        f"The cluster's API does not answer ({exc or type(exc).__name__}). What runs there goes on.",
        reason="KUBERNETES_AWAY",
    )
