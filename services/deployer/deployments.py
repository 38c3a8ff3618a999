"""Use cases over deployments and their revisions. Each checks everything before it writes anything."""

import contextlib
import logging
import re
import secrets
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from services.deployer import domain, messages, ports, scaling
from services.deployer.addresses import Addresses
from services.deployer.domain import MAIN, Bento, Deployment, Revision, Status
from services.deployer.filters import filter_of
from services.deployer.runtimes.exposures import Exposed
from services.deployer.settings import Settings
from services.deployer.store import Store
from services.deployer.templates import Templates
from services.deployer.uses import Uses
from services.kernel import telemetry, updates
from services.kernel.clock import Clock
from services.kernel.identity import Principal

log = logging.getLogger(__name__)

CHANGEABLE = (
    "labels",
    "template",
    "template.bento",
    "template.envs",
    "template.secrets",
    "template.services",
    "template.canary",
    "template.image",
    "template.model_delivery",
    "scaling",
    "capture",
    "access_authorization",
    "exposure",
)
ATTEMPTS = 5
"""How often a create looks for another port, or another name made up by the server."""


class Deployments:
    """See the module. `changed` is called with the uid of a deployment whose desired state changed, `accept` with a
    revision before it is written: it raises where that could never run."""

    def __init__(
        self,
        store: Store,
        templates: Templates,
        uses: Uses,
        settings: Settings,
        clock: Clock,
        changed: Callable[[str], None],
        addresses: Addresses,
        check_exposure: Callable[[Exposed], Awaitable[None]],
        accept: Callable[[Deployment, Revision], Awaitable[None]],
    ) -> None:
        """`check_exposure` asks the cluster whether it would take it."""
        self._store, self._settings, self._clock, self._changed = store, settings, clock, changed
        self._addresses, self._check_exposure = addresses, check_exposure
        self._templates, self._uses, self._accept = templates, uses, accept

    # Reading

    async def get(self, organization: str, name: str) -> tuple[Deployment, Revision]:
        """A deployment with its latest revision."""
        found = await self._store.get_deployment(organization, names.Deployment.parse(name).deployment)
        if found is None:
            raise _missing(name)
        return found, await self._latest(found)

    async def search(self, organization: str, filter: str) -> Sequence[Deployment]:
        """Deployments that match, newest first."""
        wanted = filter_of(filter)
        return [one for one in await self._store.list_deployments(organization) if wanted(one)]

    async def latest(self, deployment: Deployment) -> Revision:
        """Its newest revision."""
        return await self._latest(deployment)

    async def get_revision(self, organization: str, name: str) -> tuple[Deployment, Revision]:
        """One revision and its deployment."""
        parsed = names.Revision.parse(name)
        deployment, _ = await self.get(organization, f"deployments/{parsed.deployment}")
        return deployment, await self._revision(deployment, int(parsed.revision))

    async def list_revisions(
        self, organization: str, parent: str, below: int | None, limit: int
    ) -> tuple[Deployment, Sequence[Revision]]:
        """Revisions of a deployment, newest first."""
        deployment, _ = await self.get(organization, parent)
        return deployment, await self._store.list_revisions(deployment.uid, below=below, limit=limit)

    # Changing

    async def create(
        self, sent: pb.Deployment, caller: Principal, *, validate_only: bool
    ) -> tuple[Deployment, Revision]:
        """Write a new deployment with its first revision."""
        given = names.Deployment.parse(sent.name).deployment if sent.name else ""
        cluster, namespace = await self._where(sent)
        template, bentos = await self._templates.resolve(sent)
        exposure = sent.exposure if sent.HasField("exposure") else None
        if given and await self._store.get_deployment(caller.organization, given) is not None:
            raise _taken(given)
        now, uid = self._clock.now(), str(uuid.uuid4())
        revision = Revision(uid, 1, str(uuid.uuid4()), messages.template_json(template), bentos, caller.user, now)
        for attempt in range(ATTEMPTS):
            deployment = Deployment(
                name=given or _made_up(template.bento),
                uid=uid,
                organization=caller.organization,
                labels=dict(sent.labels),
                cluster=cluster,
                scaling=messages.scaling_json(sent.scaling),
                capture=messages.capture_json(sent.capture if sent.HasField("capture") else None),
                access_authorization=sent.access_authorization,
                dev=sent.dev,
                generation=1,
                latest_revision=1,
                terminated=False,
                deleting=False,
                port=await ports.free_port(self._settings, self._store),
                build="",
                traceparent=telemetry.current_traceparent(),
                creator=caller.user,
                create_time=now,
                update_time=now,
                status=Status("DEPLOYING"),
                exposure=messages.exposure_json(exposure),
                exposed_host=(sent.exposure.host or None),
                kubernetes_namespace=namespace,
            )
            if not attempt:
                await self._accept(deployment, revision)
            await self._check_exposed(deployment)
            if validate_only:
                break
            await self._uses.claim(deployment, revision)
            if await self._store.add_deployment(deployment, revision):
                break
            if given and await self._store.get_deployment(caller.organization, given) is not None:
                raise _taken(given)
        else:
            raise Aborted("No free port could be claimed; try again.", reason="PORT_TAKEN")
        if not validate_only:
            log.info("deployment created", extra={"deployment": deployment.name, "port": deployment.port})
            self._changed(uid)
        return deployment, revision

    async def update(
        self, sent: pb.Deployment, mask: Any, caller: Principal, *, validate_only: bool
    ) -> tuple[Deployment, Revision]:
        """Change what is desired. Another template makes a revision; a terminated deployment starts again."""
        before, latest = await self._changeable(caller.organization, sent.name)
        paths = updates.paths(sent, mask, CHANGEABLE)
        current = messages.deployment(before, latest, self._addresses.urls(before))
        updates.check_etag(sent.etag, current.etag)
        wanted = pb.Deployment()
        wanted.CopyFrom(current)
        for path in sorted(paths):
            _copy(sent, wanted, path)
        if any(path.startswith("template") for path in paths):
            template, bentos = await self._templates.resolve(wanted, lenient="scaling" not in paths)
        else:
            template, bentos = messages.template(latest.template), latest.bentos
            self._templates.check(wanted, bentos[MAIN].parsed() if "scaling" in paths else None)
        text = messages.template_json(template)
        new = None
        if text != latest.template or _digests(bentos) != _digests(latest.bentos):
            new = self._next(before, text, bentos, caller)
        after = replace(
            before,
            labels=dict(wanted.labels),
            scaling=messages.scaling_json(wanted.scaling),
            capture=messages.capture_json(wanted.capture if wanted.HasField("capture") else None),
            access_authorization=wanted.access_authorization,
            exposure=messages.exposure_json(wanted.exposure if wanted.HasField("exposure") else None),
            exposed_host=wanted.exposure.host or None,
        )
        if after.exposure != before.exposure:
            await self._check_exposed(after)
        return await self._write(before, after, latest, new, validate_only=validate_only)

    async def rollback(self, organization: str, name: str, to: str, caller: Principal) -> tuple[Deployment, Revision]:
        """A new revision with the template of an old one."""
        before, latest = await self._changeable(organization, name)
        number = before.latest_revision - 1
        if to:
            parsed = names.Revision.parse(to)
            if parsed.deployment != before.name:
                raise InvalidArgument(
                    f"{to} is no revision of {name}.",
                    reason="REVISION_OF_ANOTHER",
                    violations=[("revision", f"must be a revision of {name}")],
                )
            number = int(parsed.revision)
        if number < 1:
            raise FailedPrecondition(
                f"{name} has no earlier revision to go back to.", reason="NO_EARLIER_REVISION", deployment=name
            )
        old = await self._revision(before, number)
        await self._templates.check_secrets(messages.template(old.template))
        new = replace(self._next(before, old.template, old.bentos, caller), rolled_back_to=number)
        return await self._write(before, before, latest, new)

    async def scale(self, organization: str, name: str, service: str, count: int) -> tuple[Deployment, Revision]:
        """Another number of replicas, in the same revision."""
        before, latest = await self._changeable(organization, name)
        if not 1 <= count <= domain.MAX_REPLICAS:
            domain.refuse([("replicas", f"must be from 1 to {domain.MAX_REPLICAS}")])
        manifest = latest.bentos[MAIN].parsed()
        service = service or manifest.entry
        known = [one.name for one in manifest.services]
        if service not in known:
            domain.refuse(
                [("service", f"{service!r} is none of {latest.bentos[MAIN].name}, which has {', '.join(known)}")]
            )
        scalings = messages.scaling(before.scaling)
        scaling.scale(scalings.setdefault(service, pb.Scaling()), count)
        return await self._write(before, replace(before, scaling=messages.scaling_json(scalings)), latest)

    async def terminate(self, organization: str, name: str) -> tuple[Deployment, Revision]:
        """Nothing of it should run."""
        before, latest = await self._changeable(organization, name)
        return await self._write(before, replace(before, terminated=True), latest, starts=False)

    async def delete(self, organization: str, name: str, etag: str) -> tuple[Deployment, Revision]:
        """Nothing of it should be left; replicas drain first."""
        before, latest = await self.get(organization, name)
        if before.deleting:
            return before, latest
        updates.check_etag(etag, messages.deployment(before, latest, ()).etag)
        # Its host is another's to take from now on.
        return await self._write(before, replace(before, deleting=True, exposed_host=None), latest, starts=False)

    # Below

    async def _where(self, sent: pb.Deployment) -> tuple[str, str]:
        """The cluster, and the namespace of one that was added."""
        cluster = names.Cluster.parse(sent.cluster).cluster if sent.cluster else domain.DEFAULT_CLUSTER
        found = await self._store.get_cluster(cluster)
        if found is None:
            raise NotFound(
                f"Cluster {cluster!r} does not exist; `ekiben clusters list` says which there are.",
                reason="CLUSTER_NOT_FOUND",
                cluster=cluster,
            )
        wanted = sent.kubernetes_namespace
        if wanted and wanted not in found.namespaces:
            allowed = f"one of {', '.join(found.namespaces)}" if found.namespaces else "left out in this cluster"
            domain.refuse([("deployment.kubernetes_namespace", f"must be {allowed}")], reason="NAMESPACE_NOT_ALLOWED")
        return cluster, wanted or next(iter(found.namespaces), "")

    async def _write(
        self,
        before: Deployment,
        after: Deployment,
        latest: Revision,
        new: Revision | None = None,
        *,
        starts: bool = True,
        validate_only: bool = False,
    ) -> tuple[Deployment, Revision]:
        if starts:
            after = replace(after, terminated=False)
        if new is not None:
            after = replace(after, latest_revision=new.number)
        if after == before:
            return before, latest
        if new is not None or (starts and before.terminated):
            # An old revision too: what it uses may have been taken back, or be gone, since.
            await self._accept(after, new or latest)
        after = replace(
            after,
            generation=before.generation + 1,
            update_time=self._clock.now(),
            traceparent=telemetry.current_traceparent(),
        )
        if not validate_only:
            if new is not None:
                await self._uses.claim(after, new)
            await self._store.change_deployment(after, before.generation, new)
            self._changed(after.uid)
        return after, new or latest

    def _next(self, of: Deployment, template: str, bentos: Mapping[str, Bento], caller: Principal) -> Revision:
        now = self._clock.now()
        return Revision(of.uid, of.latest_revision + 1, str(uuid.uuid4()), template, bentos, caller.user, now)

    async def _changeable(self, organization: str, name: str) -> tuple[Deployment, Revision]:
        deployment, latest = await self.get(organization, name)
        if deployment.deleting:
            raise FailedPrecondition(f"{name} is being deleted.", reason="DEPLOYMENT_DELETING", deployment=name)
        return deployment, latest

    async def _latest(self, deployment: Deployment) -> Revision:
        return await self._revision(deployment, deployment.latest_revision)

    async def _revision(self, deployment: Deployment, number: int) -> Revision:
        found = await self._store.get_revision(deployment.uid, number)
        if found is None:
            name = f"deployments/{deployment.name}/revisions/{number}"
            raise NotFound(f"{name} does not exist.", reason="REVISION_NOT_FOUND", revision=name)
        return found

    async def _check_exposed(self, deployment: Deployment) -> None:
        """Raises for an exposure that the platform or its cluster would not take."""
        self._addresses.check_name(deployment)
        sent = messages.exposure(deployment.exposure)
        if sent is None:
            return
        self._addresses.check(sent)
        domain.refuse(self._addresses.violations(sent, deployment.name))
        host = deployment.exposed_host
        if host is not None and await self._store.host_taken(host, deployment.uid):
            raise AlreadyExists(
                f"Another deployment has the host {host}; choose another one.", reason="HOST_TAKEN", host=host
            )
        exposed = self._addresses.exposed(deployment)
        if exposed is not None:
            with contextlib.suppress(Unavailable):  # What comes of it is seen later.
                await self._check_exposure(exposed)


def _copy(source: pb.Deployment, target: pb.Deployment, path: str) -> None:
    *parents, field = path.split(".")
    one: Any = source
    other: Any = target
    for parent in parents:
        one, other = getattr(one, parent), getattr(other, parent)
    other.ClearField(field)
    partial = type(one)()
    partial.CopyFrom(one)
    for descriptor, _ in one.ListFields():
        if descriptor.name != field:
            partial.ClearField(descriptor.name)
    other.MergeFrom(partial)


def _digests(bentos: Mapping[str, Bento]) -> dict[str, object]:
    return {target: (bento.name, bento.digest, bento.models) for target, bento in bentos.items()}


def _made_up(bento: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", bento.split("/")[1].lower()).strip("-")[:50].rstrip("-")
    if not slug or not slug[0].isalpha():
        slug = f"bento-{slug}".rstrip("-")
    return f"{slug}-{secrets.token_hex(2)}"


def _missing(name: str) -> NotFound:
    return NotFound(f"{name} does not exist.", reason="DEPLOYMENT_NOT_FOUND", deployment=name)


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(
        f"deployments/{name} exists already; update it, or choose another name.",
        reason="DEPLOYMENT_EXISTS",
        deployment=f"deployments/{name}",
    )
