"""The deployer's parts, opened in order and closed in reverse."""

import asyncio
import contextlib
import fcntl
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.builder.v1 import builder_pb2_grpc, images_pb2, images_pb2_grpc
from ekiben.deployer.v1 import clusters_pb2_grpc, deployer_pb2_grpc, events_pb2_grpc, terminals_pb2_grpc
from ekiben.errors import EkibenError, ResourceExhausted
from ekiben.identity.v1 import identity_pb2_grpc
from ekiben.registry.v1 import lineage_pb2_grpc, registry_pb2_grpc
from services.content.archives import fetch_content
from services.content.attestations import keyless, keys
from services.content.sealing import open_key_file
from services.deployer import domain, instances
from services.deployer.acceptance import Acceptance
from services.deployer.addresses import Addresses
from services.deployer.builds import Builds, Output
from services.deployer.clusters import Clusters, Place
from services.deployer.deployments import Deployments
from services.deployer.gate import Gate
from services.deployer.ownership import Ownership
from services.deployer.reconciler import Reconciler
from services.deployer.runtimes import Runtime
from services.deployer.runtimes.containers import ContainerStarter
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.pulling import Login, Logins
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from services.deployer.runtimes.kubernetes.telemetry import PodTelemetry
from services.deployer.runtimes.podman import Podman
from services.deployer.runtimes.process import open_process_runtime
from services.deployer.runtimes.replica import Limits
from services.deployer.runtimes.serving import Telemetry
from services.deployer.runtimes.several import SeveralRuntimes
from services.deployer.runtimes.starting import Fetch, ProcessStarter, Starter
from services.deployer.servicer import (
    ClustersServicer,
    DeploymentsServicer,
    EventsServicer,
    InstanceTypesServicer,
    RoutesServicer,
)
from services.deployer.settings import Settings
from services.deployer.store import Store, TerminalStore
from services.deployer.templates import Templates
from services.deployer.terminal_servicer import TerminalsServicer
from services.deployer.terminals import Terminals
from services.deployer.uses import Uses
from services.kernel.app import Component, Servicer
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import open_database
from services.kernel.identity import Principal
from services.kernel.leases import id_kept_in
from services.kernel.news import News
from services.kernel.peers import Peers, on_behalf_of
from services.kernel.settings import SettingsError


@asynccontextmanager
async def open_deployer(settings: Settings, peers: Peers, *, clock: Clock = SYSTEM) -> AsyncIterator[Component]:
    """Everything the deployer needs. Replicas that a former deployer left are adopted before this yields."""
    uploads = registry_pb2_grpc.UploadsStub(peers.registry)

    async def fetch(resource: str, into: Path) -> None:
        await fetch_content(uploads, peers.blobs, resource, into)

    limits = Limits(
        probe_timeout_s=settings.probe_timeout_s,
        start_timeout_s=settings.start_timeout_s,
        liveness_s=settings.liveness_s,
        orphan_grace_s=settings.orphan_grace_s,
        log_max_bytes=settings.log_max_bytes,
        log_keep=settings.log_keep,
    )
    instance_types = instances.load(settings.instance_types, settings.instance_types_file)
    data_dir = settings.data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with AsyncExitStack() as stack:
        stack.enter_context(_alone_in(data_dir))
        database = await stack.enter_async_context(open_database(settings))
        runtime: Runtime
        if settings.runtime != "kubernetes":
            # Before the database is waited for: replicas are looked after whether it is there or not.
            passed = {name: os.environ[name] for name in settings.pass_environment if name in os.environ}
            starter, run_dir = _starter(settings, fetch), settings.run_dir.absolute()
            opening = open_process_runtime(
                data_dir, run_dir, starter, limits=limits, pass_environment=passed, clock=clock
            )
            runtime = await stack.enter_async_context(opening)
        await database.migrate("services.deployer.migrations")
        store = Store(database)
        cluster = await store.ensure_cluster(domain.DEFAULT_CLUSTER, str(uuid.uuid4()), clock.now())
        if settings.runtime == "kubernetes":
            logins = _logins(settings, images_pb2_grpc.ImagesStub(peers.builder))
            runtime = await stack.enter_async_context(_kubernetes(settings, cluster[0], logins, clock))
        several = SeveralRuntimes(runtime)
        runtime = several
        key_file = settings.secrets_key_file or data_dir / "secrets.key"
        sealed = any(one.kubeconfig is not None for one in await store.list_clusters())
        clusters = Clusters(store, cache(partial(open_key_file, key_file, may_make=not sealed)), several, clock)

        def open_cluster(
            of: domain.Cluster, namespace: str, kubeconfig: dict[str, Any] | None
        ) -> AbstractAsyncContextManager[Place]:
            where = Where(
                of.uid,
                namespace,
                of.pull_secret,
                PodTelemetry(of.otlp_http_endpoint, settings.otlp_token_file),
                pod_security=settings.kubernetes_pod_security,
                signed_only=settings.image_policy == "enforce",
            )
            nodes = _logins(settings, images_pb2_grpc.ImagesStub(peers.builder))
            return open_kubernetes_runtime(kubeconfig, "", where, pull_host=of.pull_host, logins=nodes, clock=clock)

        vault = identity_pb2_grpc.SecretsStub(peers.registry)
        addresses = Addresses(settings)
        owner = await asyncio.to_thread(id_kept_in, data_dir / "owner")
        ownership = Ownership(store, domain.DEFAULT_CLUSTER, owner, clock, lease_s=settings.owner_lease_s)
        with contextlib.suppress(ResourceExhausted):  # A full disk must not keep what runs from being looked after.
            await ownership.look()
        changes = News(database, clock)
        uses = Uses(store, lineage_pb2_grpc.LineageStub(peers.registry), clock)
        gate = _gate(settings, clock)
        builds = Builds(
            builder_pb2_grpc.BuildsStub(peers.builder),
            images_pb2_grpc.ImagesStub(peers.builder),
            Output.ENVIRONMENT if settings.runtime == "process" else Output.IMAGE,
            clock,
            gate,
        )
        reconciler = Reconciler(
            store, runtime, builds, vault, uses, ownership, changes, settings, instance_types, clock, addresses
        )
        several.renewed = reconciler.ask_anew
        bentos, models = registry_pb2_grpc.BentosStub(peers.registry), registry_pb2_grpc.ModelsStub(peers.registry)
        templates = Templates(bentos, models, vault, settings, instance_types)
        deployments = Deployments(
            store,
            templates,
            uses,
            settings,
            clock,
            reconciler.wake,
            addresses,
            runtime.check_exposure,
            Acceptance(runtime, instance_types, settings.metric_names, settings.drain_s),
        )

        terminals = Terminals(TerminalStore(database), deployments, reconciler, runtime, settings, owner, clock, gate)

        yield Component(
            "deployer",
            servicers=[
                Servicer(
                    "ekiben.deployer.v1.Deployments",
                    deployer_pb2_grpc.add_DeploymentsServicer_to_server,
                    DeploymentsServicer(deployments, reconciler, runtime, addresses),
                ),
                Servicer(
                    "ekiben.deployer.v1.Events",
                    events_pb2_grpc.add_EventsServicer_to_server,
                    EventsServicer(deployments, reconciler, runtime),
                ),
                Servicer(
                    "ekiben.deployer.v1.Terminals",
                    terminals_pb2_grpc.add_TerminalsServicer_to_server,
                    TerminalsServicer(terminals),
                ),
                Servicer(
                    "ekiben.deployer.v1.InstanceTypes",
                    deployer_pb2_grpc.add_InstanceTypesServicer_to_server,
                    InstanceTypesServicer(list(instance_types.values()), clusters, settings),
                ),
                Servicer(
                    "ekiben.deployer.v1.Clusters",
                    clusters_pb2_grpc.add_ClustersServicer_to_server,
                    ClustersServicer(clusters, settings),
                ),
                Servicer(
                    "ekiben.deployer.v1.Routes",
                    deployer_pb2_grpc.add_RoutesServicer_to_server,
                    RoutesServicer(reconciler),
                ),
            ],
            loops=[
                reconciler.run,
                ownership.run,
                changes.run,
                terminals.run,
                partial(ownership.while_held, uses.run),
                partial(clusters.run, open_cluster),
            ],
            ready=database.ping,
            standby=ownership.standby,
            drain=reconciler.drain,
        )


def _gate(settings: Settings, clock: Clock) -> Gate | None:
    """Who says which images may be run. Raises SettingsError for keys that cannot be read, as they are now."""
    if settings.image_policy == "off":
        return None
    try:
        keys.load_trusted(settings.image_keys)
        if settings.image_identities:
            keyless.require()
        return Gate(settings.image_policy, settings.image_keys, settings.image_identities, clock)
    except EkibenError as exc:
        raise SettingsError([f"image_policy: {exc.message}"]) from None


def _starter(settings: Settings, fetch: Fetch) -> Starter:
    """What replicas are on this machine."""
    data_dir, run_dir = settings.data_dir.absolute(), settings.run_dir.absolute()
    telemetry = Telemetry(settings.otlp_http_endpoint.rstrip("/"), settings.otlp_token_file)
    if settings.runtime == "process":
        return ProcessStarter(data_dir, run_dir, fetch, telemetry)
    podman = Podman(data_dir, run_dir, runtime=settings.podman_runtime)
    return ContainerStarter(podman, run_dir, telemetry, settings.podman_network)


def _kubernetes(
    settings: Settings, installation: str, logins: Logins, clock: Clock
) -> AbstractAsyncContextManager[KubernetesRuntime]:
    """Replicas as pods; `installation` marks what is ours."""
    telemetry = PodTelemetry(settings.otlp_http_endpoint, settings.otlp_token_file)
    where = Where(
        installation,
        settings.kubernetes_namespace,
        settings.kubernetes_pull_secret,
        telemetry,
        settings.kubernetes_pod_security,
        signed_only=settings.image_policy == "enforce",
    )
    return open_kubernetes_runtime(
        settings.kubeconfig,
        settings.kubernetes_context,
        where,
        pull_host=settings.kubernetes_pull_host,
        logins=logins,
        gateway_service=settings.kubernetes_gateway_service,
        clock=clock,
    )


def _logins(settings: Settings, images: "images_pb2_grpc.ImagesAsyncStub") -> Logins:
    """With what nodes pull from the builder."""

    async def issue(organization: str, lifetime: timedelta) -> Login:
        request = images_pb2.CreatePullTokenRequest()
        request.lifetime.FromTimedelta(lifetime)
        with on_behalf_of(Principal("services/deployer", f"organizations/{organization}", Role.ROLE_SERVICE)):
            given = await images.CreatePullToken(request)
        return Login(given.token, given.expire_time.ToDatetime(UTC))

    return Logins(issue, timedelta(seconds=settings.kubernetes_pull_token_s))


@contextmanager
def _alone_in(data_dir: Path) -> Iterator[None]:
    """Hold the data directory: two deployers on one would each end the other's replicas."""
    handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fault = f"data_dir: {data_dir} is in use by another deployer; give each one of its own."
            raise SettingsError([fault]) from None
        yield
    finally:
        os.close(handle)
