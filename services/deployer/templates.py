"""Templates of deployments as callers send them: whether they may be so, and what they name.

Bentos, their models and secrets are looked up in the registry; what a tag stands for is settled here, once.
"""

import re
from collections.abc import Mapping
from typing import Any

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import FailedPrecondition, InvalidArgument
from ekiben.identity.v1 import identity_pb2
from ekiben.registry.v1 import registry_pb2
from services.deployer import domain, pods, prebuilt, scaling
from services.deployer.domain import MAIN, Bento, BentoManifest
from services.deployer.settings import Settings

MAX_BODY_BYTES = 1 << 20


class Templates:
    """See the module. `bentos`, `models` and `vault` are stubs of the registry."""

    def __init__(
        self,
        bentos: Any,
        models: Any,
        vault: Any,
        settings: Settings,
        instance_types: Mapping[str, domain.InstanceType],
    ) -> None:
        self._bentos, self._models, self._vault = bentos, models, vault
        self._settings, self._instance_types = settings, instance_types

    async def resolve(self, sent: pb.Deployment, *, lenient: bool = False) -> tuple[pb.Template, Mapping[str, Bento]]:
        """The template of a deployment with its bentos resolved, and these, by target.

        Args:
            sent: as a caller sent it.
            lenient: what it says of replicas may be of services that the bento does not have.

        Raises:
            InvalidArgument: anything is wrong (FIELDS_INVALID, SERVICE_UNKNOWN, INSTANCE_TYPE_UNKNOWN and others).
            FailedPrecondition: it cannot run here, or has no content yet (BENTO_NOT_UPLOADED, MODEL_NOT_UPLOADED).
            NotFound: a bento, a model or a secret does not exist.
        """
        template = pb.Template()
        template.CopyFrom(sent.template)
        if not template.bento:
            domain.refuse([("deployment.template.bento", "is required")])
        self.check(sent)
        bentos = {MAIN: await self._bento(template.bento)}
        template.bento = bentos[MAIN].name
        found = _unknown_services(sent, bentos[MAIN].parsed(), lenient=lenient)
        for target in template.canary.versions:
            version = template.canary.versions[target]
            bentos[target] = await self._bento(version.bento)
            version.bento = bentos[target].name
            path, manifest = f"deployment.template.canary.versions[{target}]", bentos[target].parsed()
            found += _unknown(f"{path}.services", version.services, manifest)
            found += _unknown(f"{path}.scaling", version.scaling, manifest)
        domain.refuse(found, reason="SERVICE_UNKNOWN")
        await self.check_secrets(template)
        await prebuilt.settle(template, self._runtime_in(sent.cluster), self._settings.model_delivery)
        return template, bentos

    def check(self, sent: pb.Deployment, manifest: BentoManifest | None = None) -> None:
        """Whether a deployment may be so, as far as that shows without asking anybody. With the `manifest` of main's
        bento its services must be that bento's.

        Raises:
            InvalidArgument: it may not (FIELDS_INVALID, INSTANCE_TYPE_UNKNOWN).
        """
        found = self._violations(sent)
        domain.refuse(found if manifest is None else found + _unknown_services(sent, manifest, lenient=False))

    async def check_secrets(self, template: pb.Template) -> None:
        """Raises NotFound for a secret that is not there, or is another organization's."""
        wanted = [*template.secrets, *(s for v in template.canary.versions.values() for s in v.secrets)]
        for secret in dict.fromkeys(wanted):
            names.Secret.parse(secret)
            await self._vault.GetSecret(identity_pb2.GetSecretRequest(name=secret))

    async def _bento(self, name: str) -> Bento:
        names.Bento.parse(name)
        bento = await self._bentos.GetBento(registry_pb2.GetBentoRequest(name=name))
        if bento.content.state != registry_pb2.Content.READY:
            raise FailedPrecondition(
                f"{bento.name} has no content yet; push it first.", reason="BENTO_NOT_UPLOADED", bento=bento.name
            )
        models = []
        for model in bento.models:
            found = await self._models.GetModel(registry_pb2.GetModelRequest(name=model))
            if found.content.state == registry_pb2.Content.EXTERNAL:
                continue  # A hub has it, and BentoML fetches it itself.
            if found.content.state != registry_pb2.Content.READY:
                raise FailedPrecondition(
                    f"{model}, which {bento.name} needs, has no content yet; push it first.",
                    reason="MODEL_NOT_UPLOADED",
                    model=model,
                    bento=bento.name,
                )
            models.append((found.name, found.content.digest))
        resolved = Bento(bento.name, bento.content.digest, bento.manifest, tuple(models))
        resolved.parsed()
        return resolved

    def _violations(self, sent: pb.Deployment) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for key, value in sent.labels.items():
            if not 0 < len(key) <= 128 or len(value) > 1024:
                found.append((f"deployment.labels[{key[:32]}]", "keys have 1 to 128 characters, values at most 1024"))
        template = sent.template
        found += self._template_violations("deployment.template", template.envs, template.services)
        canary = template.canary
        if canary.route_type not in domain.ROUTE_TYPES:
            found.append(("deployment.template.canary.route_type", "must be random, header or query"))
        if canary.route_type in ("header", "query") and not canary.route_by:
            found.append(("deployment.template.canary.route_by", f"is required for {canary.route_type}"))
        share = 0
        for target, version in canary.versions.items():
            path = f"deployment.template.canary.versions[{target}]"
            if target == MAIN or not re.fullmatch(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?", target):
                found.append((path, f"{target!r} cannot be the name of a version"))
            if not version.bento:
                found.append((f"{path}.bento", "is required"))
            if not 0 <= version.weight_percent <= 100:
                found.append((f"{path}.weight_percent", "must be from 0 to 100"))
            share += max(0, version.weight_percent)
            found += self._template_violations(path, version.envs, version.services)
            found += self._scaling_violations(f"{path}.scaling", version.scaling, sent.cluster)
        if share > 100:
            found.append(("deployment.template.canary.versions", f"the weights add up to {share}, more than 100"))
        found += self._scaling_violations("deployment.scaling", sent.scaling, sent.cluster)
        capture = sent.capture
        if capture.HasField("sample_percent") and not 0 <= capture.sample_percent <= 100:
            found.append(("deployment.capture.sample_percent", "must be from 0 to 100"))
        if capture.HasField("max_body_bytes") and not 0 <= capture.max_body_bytes <= MAX_BODY_BYTES:
            found.append(("deployment.capture.max_body_bytes", f"must be from 0 to {MAX_BODY_BYTES}"))
        return found

    def _template_violations(self, path: str, envs: Any, services: Any) -> list[tuple[str, str]]:
        found = domain.check_envs(f"{path}.envs", (env.name for env in envs))
        for name, service in services.items():
            here = f"{path}.services[{name}]"
            found += domain.check_envs(f"{here}.envs", (env.name for env in service.envs))
            found += domain.check_strategy(f"{here}.deployment_strategy", service.deployment_strategy)
            found += pods.violations(f"{here}.pod", service.pod)
            kind = service.instance_type
            if kind and kind not in self._instance_types:
                known = ", ".join(self._instance_types)
                raise InvalidArgument(
                    f"There is no instance type {kind!r}; these there are: {known}.",
                    reason="INSTANCE_TYPE_UNKNOWN",
                    violations=[(f"{here}.instance_type", f"must be one of {known}")],
                    instance_type=kind,
                )
        return found

    def _scaling_violations(
        self, path: str, by_service: Mapping[str, pb.Scaling], cluster: str
    ) -> list[tuple[str, str]]:
        found = []
        runtime = self._runtime_in(cluster)
        for service, one in by_service.items():
            field = f"{path}[{service}]"
            least = one.min_replicas if one.HasField("min_replicas") else None
            found += domain.check_scaling(field, least, one.max_replicas if one.HasField("max_replicas") else None)
            found += scaling.violations(field, one, runtime=runtime, scales=runtime == "kubernetes")
        return found

    def _runtime_in(self, cluster: str) -> str:
        """The runtime of `clusters/{cluster}`; empty for the default one."""
        here = cluster in ("", f"clusters/{domain.DEFAULT_CLUSTER}")
        return self._settings.runtime if here else "kubernetes"


def _unknown_services(sent: pb.Deployment, manifest: BentoManifest, *, lenient: bool) -> list[tuple[str, str]]:
    found = _unknown("deployment.template.services", sent.template.services, manifest)
    if not lenient:
        found += _unknown("deployment.scaling", sent.scaling, manifest)
    return found


def _unknown(path: str, services: Any, manifest: BentoManifest) -> list[tuple[str, str]]:
    if manifest.legacy:
        return []  # Its runners, which a client may name, are no services of their own here.
    known = [service.name for service in manifest.services]
    return [
        (f"{path}[{name}]", f"the bento has the services {', '.join(known)}") for name in services if name not in known
    ]
