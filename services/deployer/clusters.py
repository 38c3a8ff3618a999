"""Clusters that somebody added: their rows, and a runtime in each namespace of each, opened and closed as rows change.

The default cluster is what the settings say. One that is away hurts no other: its runtime waits for it.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import yaml

from ekiben import names
from ekiben.deployer.v1 import clusters_pb2
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import Aborted, AlreadyExists, EkibenError, FailedPrecondition, NotFound
from services.content.images.registry.names import is_host
from services.content.sealing import Sealed, Sealing
from services.deployer import domain, kubeconfigs
from services.deployer.domain import Cluster
from services.deployer.runtimes import Runtime
from services.deployer.runtimes.kubernetes import rights
from services.deployer.runtimes.kubernetes.api import open_api
from services.deployer.runtimes.several import SeveralRuntimes
from services.deployer.store import Store
from services.kernel import updates
from services.kernel.clock import Clock
from services.kernel.settings import SettingsError
from services.kernel.watches import Signal

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Another deployer may have changed the rows."""
PATIENCE_S = 30.0
"""Until it is said of credentials that they have not taken over."""
CHANGEABLE = ("description", "kubeconfig", "namespaces", "pull_host", "pull_secret", "otlp_http_endpoint")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
MAX_NAMESPACES = 50


class Place(Runtime, Protocol):
    """The runtime of a namespace."""

    async def filled(self) -> None:
        """Wait until it knows what is there; for ever where the cluster does not answer."""
        ...

    def fault(self) -> str:
        """Why it does not know that yet, in words; empty where nothing was answered."""
        ...


@dataclass
class _Held:
    """A place, and who holds it: who serves it, and after other credentials were given who is to take over."""

    identity: tuple[Any, ...]
    tasks: list[asyncio.Task[None]]


Open = Callable[[Cluster, str, "dict[str, Any] | None"], AbstractAsyncContextManager[Place]]
"""Opens the runtime of a cluster's namespace; the last is its kubeconfig, None for the pod's own identity."""


class Clusters:
    """See the module."""

    def __init__(self, store: Store, sealing: Callable[[], Sealing], runtimes: SeveralRuntimes, clock: Clock) -> None:
        """`sealing` is asked when there is something to seal or to open: a key file is made at the first."""
        self._store, self._sealing, self._runtimes, self._clock = store, sealing, runtimes, clock
        self._signal = Signal()
        self._late: dict[tuple[str, object], Callable[[], str]] = {}
        """Why a place has not the runtime that it should have, by the place and who is to hold it."""

    # Rows

    async def get(self, name: str) -> Cluster:
        """One cluster. Raises NotFound (CLUSTER_NOT_FOUND)."""
        found = await self._store.get_cluster(names.Cluster.parse(name).cluster)
        if found is None:
            raise NotFound(
                f"{name} does not exist; `ekiben clusters list` says which clusters there are.",
                reason="CLUSTER_NOT_FOUND",
                cluster=name,
            )
        return found

    async def search(self) -> Sequence[Cluster]:
        """All of them; the default one first."""
        return sorted(await self._store.list_clusters(), key=lambda one: (one.name != domain.DEFAULT_CLUSTER, one.name))

    def detail(self, cluster: Cluster) -> str:
        """Why it is not reached as its row says, in words; empty where nothing is known to be wrong."""
        found = [why() for (place, _), why in self._late.items() if place in cluster.places]
        hint = f"`ekiben clusters check {cluster.name}` says what the credentials lack."
        return " ".join([*dict.fromkeys(found), hint]) if found else ""

    async def create(self, sent: pb.Cluster) -> Cluster:
        """Add one."""
        name = names.Cluster.parse(sent.name).cluster
        made = self._changed(Cluster(name, str(uuid.uuid4()), self._clock.now()), sent, CHANGEABLE)
        if not await self._store.add_cluster(made):
            raise AlreadyExists(
                f"There is a cluster {name!r}; `ekiben clusters update` changes it.",
                reason="CLUSTER_EXISTS",
                cluster=sent.name,
            )
        self._signal.notify()
        return made

    async def update(self, sent: pb.Cluster, mask: Any) -> Cluster:
        """Change one; what runs there goes on.

        Raises:
            FailedPrecondition: deployments are in a namespace that would go (CLUSTER_IN_USE), or it is the default one.
        """
        before = await self._added(sent.name)
        after = self._changed(before, sent, updates.paths(sent, mask, CHANGEABLE))
        gone = set(before.namespaces) - set(after.namespaces)
        for deployment in await self._store.list_deployments():
            if deployment.cluster == before.name and deployment.kubernetes_namespace in gone:
                raise FailedPrecondition(
                    f"deployments/{deployment.name} is in the namespace {deployment.kubernetes_namespace}; delete it "
                    "first, or leave the namespace allowed.",
                    reason="CLUSTER_IN_USE",
                    cluster=sent.name,
                )
        if not await self._store.change_cluster(after):
            raise Aborted("Somebody else changed the cluster meanwhile; try again.", reason="CLUSTER_CHANGED")
        self._signal.notify()
        return replace(after, generation=after.generation + 1)

    async def delete(self, name: str) -> None:
        """Remove one in which there are no deployments."""
        cluster = await self._added(name)
        if there := await self._store.remove_cluster(cluster.name):
            raise FailedPrecondition(
                f"{name} has deployments ({', '.join(there)}): delete these first.",
                reason="CLUSTER_IN_USE",
                cluster=name,
            )
        self._signal.notify()

    async def check(self, name: str) -> clusters_pb2.CheckClusterResponse:
        """Whether it answers, what its credentials lack, and which of its namespaces are not there."""
        cluster = await self._added(name)
        answer = clusters_pb2.CheckClusterResponse()
        try:
            config = self._opened(cluster)
            for namespace in cluster.namespaces:
                async with open_api(config, "", namespace) as api:
                    answer.version = answer.version or await api.version()
                    answer.missing.extend(rights.missing(await api.rules(), namespace))
                    if not await api.has_namespace():
                        answer.absent_namespaces.append(namespace)
            answer.reachable = True
        except EkibenError as exc:
            answer.message = exc.message
        except SettingsError as exc:
            answer.message = str(exc)
        return answer

    async def roles(self, name: str, account: str) -> str:
        """The manifests of the rights that are needed."""
        cluster = await self._added(name)
        account = account or f"{cluster.namespaces[0]}/ekiben"
        parts = account.split("/")
        if len(parts) != 2 or not all(_NAMESPACE.fullmatch(part) for part in parts):
            domain.refuse([("service_account", "must be NAMESPACE/NAME")])
        return rights.roles(cluster.namespaces, account)

    async def _added(self, name: str) -> Cluster:
        cluster = await self.get(name)
        if cluster.name == domain.DEFAULT_CLUSTER:
            raise FailedPrecondition(
                "The default cluster is what the deployer's settings say: change these.",
                reason="CLUSTER_IS_DEFAULT",
                cluster=name,
            )
        return cluster

    def _changed(self, before: Cluster, sent: pb.Cluster, paths: Sequence[str] | set[str]) -> Cluster:
        after = replace(before, update_time=self._clock.now())
        if "description" in paths:
            after = replace(after, description=sent.description)
        if "namespaces" in paths:
            after = replace(after, namespaces=_namespaces(sent.namespaces))
        if "pull_host" in paths:
            if sent.pull_host and not is_host(sent.pull_host):
                domain.refuse([("cluster.pull_host", "must be HOST[:PORT]")])
            after = replace(after, pull_host=sent.pull_host)
        if "pull_secret" in paths:
            if sent.pull_secret and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", sent.pull_secret):
                domain.refuse([("cluster.pull_secret", "must be the name of a Secret")])
            after = replace(after, pull_secret=sent.pull_secret)
        if "otlp_http_endpoint" in paths:
            scheme, _, host = sent.otlp_http_endpoint.partition("://")
            if sent.otlp_http_endpoint and not (scheme in ("http", "https") and is_host(host.removesuffix("/"))):
                domain.refuse([("cluster.otlp_http_endpoint", "must be http://HOST:PORT")])
            after = replace(after, otlp_http_endpoint=sent.otlp_http_endpoint)
        if "kubeconfig" in paths:
            after = self._sealed(after, sent)
        return after

    # Credentials

    def _sealed(self, cluster: Cluster, sent: pb.Cluster) -> Cluster:
        if not sent.kubeconfig:
            return replace(cluster, server="in-cluster", key_id="", kubeconfig=None)
        read = kubeconfigs.read(sent.kubeconfig, sent.context)
        sealed = self._sealing().seal(read.text.encode(), f"clusters/{cluster.uid}")
        return replace(cluster, server=read.server, key_id=sealed.key_id, kubeconfig=sealed.data)

    def _opened(self, cluster: Cluster) -> dict[str, Any] | None:
        if cluster.kubeconfig is None:
            return None
        sealed = Sealed(cluster.key_id, cluster.kubeconfig)
        found: dict[str, Any] = yaml.safe_load(self._sealing().open(sealed, f"clusters/{cluster.uid}"))
        return found

    # Runtimes

    async def run(self, open_runtime: Open) -> None:
        """Have a runtime in each namespace of each row, for ever."""
        held: dict[str, _Held] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    wanted = {
                        place: (cluster, place.partition("/")[2])
                        for cluster in await self._store.list_clusters()
                        if cluster.name != domain.DEFAULT_CLUSTER
                        for place in cluster.places
                    }
                except EkibenError as exc:
                    log.warning("clusters cannot be read", extra={"reason": exc.reason})
                    await self._clock.sleep(LOOK_S)
                    continue
                for place, one in [*held.items()]:
                    if place not in wanted or one.identity[0] != wanted[place][0].uid:
                        del held[place]
                        await _end(one.tasks)
                for place, (cluster, namespace) in wanted.items():
                    one = held.setdefault(place, _Held((), []))
                    if one.identity != (identity := _identity(cluster, namespace)):
                        await _end(one.tasks[1:])  # They have not taken over.
                        del one.tasks[1:]
                        one.identity = identity
                        one.tasks.append(tasks.create_task(self._hold(cluster, namespace, place, one, open_runtime)))
                await self._signal.wait(at_most_s=LOOK_S)

    async def _hold(self, cluster: Cluster, namespace: str, place: str, held: _Held, open_runtime: Open) -> None:
        """Keep a runtime open until cancelled; what cannot be opened is tried again. Who held the place before goes on
        until this one knows what is there: requests have their way all the while."""
        me = asyncio.current_task()
        try:
            while True:
                try:
                    async with open_runtime(cluster, namespace, self._opened(cluster)) as runtime:
                        if held.tasks[0] is not me:
                            await self._until_filled(runtime, namespace, place)
                        self._late.pop((place, me), None)
                        try:
                            await self._runtimes.add(place, runtime)
                            before = held.tasks[: held.tasks.index(me)] if me in held.tasks else []
                            del held.tasks[: len(before)]
                            await _end(before)
                            await asyncio.Event().wait()
                        finally:
                            self._runtimes.remove(place, runtime)
                except (EkibenError, SettingsError) as exc:
                    log.warning("a cluster cannot be opened", extra={"cluster": cluster.name, "error": str(exc)})
                    why = exc.message if isinstance(exc, EkibenError) else " ".join(exc.faults)
                    self._late[place, me] = partial("The namespace {} cannot be reached: {}".format, namespace, why)
                except Exception:  # Of one cluster: the others and the platform go on.
                    log.exception("a cluster is looked after anew", extra={"cluster": cluster.name})
                await self._clock.sleep(30.0)
        finally:
            self._late.pop((place, me), None)

    async def _until_filled(self, runtime: Place, namespace: str, place: str) -> None:
        """Wait until it knows what is there. When that takes long it is said why, each time that it is another why."""

        def why() -> str:
            reason = runtime.fault() or "the cluster has not answered yet."
            return f"In the namespace {namespace} the new credentials have not taken over: {reason}"

        filled, said = asyncio.ensure_future(runtime.filled()), ""
        try:
            while not filled.done():
                patience = asyncio.ensure_future(self._clock.sleep(PATIENCE_S))
                try:
                    await asyncio.wait([filled, patience], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    patience.cancel()
                if not filled.done():
                    self._late[place, asyncio.current_task()] = why
                    if why() != said:
                        said = why()
                        log.warning("credentials have not taken over", extra={"place": place, "error": said})
            await filled
        finally:
            filled.cancel()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _identity(cluster: Cluster, namespace: str) -> tuple[Any, ...]:
    """What a runtime is made from: another one needs a new runtime."""
    reached = (cluster.pull_host, cluster.pull_secret, cluster.otlp_http_endpoint)
    return cluster.uid, namespace, cluster.key_id, cluster.kubeconfig, *reached


def _namespaces(sent: Sequence[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(sent)) or ("ekiben",)
    wrong = [name for name in found if not _NAMESPACE.fullmatch(name)]
    if wrong or len(found) > MAX_NAMESPACES:
        why = f"{wrong[0]!r} cannot be the name of a namespace" if wrong else f"at most {MAX_NAMESPACES}"
        domain.refuse([("cluster.namespaces", why)])
    return found
