"""A revision to the replica sets that run it. Pure but for the secrets, which are given."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import json_format

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import images_pb2
from ekiben.identity.v1 import identity_pb2
from services.deployer import domain, messages, pods, scaling
from services.deployer.builds import Made
from services.deployer.domain import MAIN, BentoManifest, Condition, Deployment, InstanceType, Revision
from services.deployer.runtimes import SecretFile, SetSpec

CLOUD_ENVS = ("BENTO_CLOUD_API_KEY", "BENTO_CLOUD_API_ENDPOINT")


@dataclass(frozen=True)
class Version:
    """One target of a revision: a bento and how its services are run."""

    target: str
    bento: str
    digest: str
    models: tuple[tuple[str, str], ...]
    manifest: BentoManifest
    envs: Mapping[str, str]
    secrets: tuple[str, ...]
    services: Mapping[str, pb.ServiceTemplate]
    weight: int
    image: str = ""
    """One that somebody else made, by its digest; empty where the builder makes it."""
    pull_secrets: tuple[str, ...] = ()
    models_apart: bool = False
    """Whether models are images that are mounted, and no part of the bento's."""
    scaling: Mapping[str, pb.Scaling] | None = None
    """Replicas by service. None for main: its are the deployment's, and change without another revision."""


def versions_of(revision: Revision) -> list[Version]:
    """The targets of a revision, main first. What main is not given by canaries is its weight."""
    template = messages.template(revision.template)
    canaries = template.canary.versions
    rest = 100 - sum(version.weight_percent for version in canaries.values())
    found = [_version(revision, MAIN, template, rest)]
    for target, version in sorted(canaries.items()):
        canary = _version(revision, target, version, version.weight_percent)
        found.append(replace(canary, scaling=dict(version.scaling)))
    apart = template.model_delivery == images_pb2.IMAGE_VOLUME
    return [replace(version, models_apart=apart and not version.image) for version in found]


def _version(revision: Revision, target: str, of: Any, weight: int) -> Version:
    bento = revision.bentos[target]
    return Version(
        target,
        bento.name,
        bento.digest,
        bento.models,
        bento.parsed(),
        {env.name: env.value for env in of.envs},
        tuple(of.secrets),
        dict(of.services),
        weight,
        of.image.reference,
        tuple(of.image.pull_secrets),
    )


def scaling_of(deployment: Deployment, version: Version, service: str) -> pb.Scaling | None:
    """What was asked for the replicas of a service of a version."""
    by_service = messages.scaling(deployment.scaling) if version.scaling is None else version.scaling
    return by_service.get(service)


def desired_of(deployment: Deployment, version: Version, service: str) -> int:
    """How many replicas a service of a version should have, where nobody scales it."""
    return scaling.bounds_of(scaling_of(deployment, version, service))[0]


def key_of(uid: str, revision: int, target: str, service: str) -> str:
    """The key of a replica set: the same for the same things, and short enough for the path of a socket."""
    digest = hashlib.sha256("\0".join((uid, str(revision), target, service)).encode()).digest()
    return base64.b32encode(digest).decode().lower()[:16]


def problem_of(version: Version, secrets: Sequence[identity_pb2.Secret]) -> Condition | None:
    """Why this cannot run, if it cannot."""
    given = {**_secret_envs(secrets), **version.envs}
    entry = version.services.get(version.manifest.entry)
    given |= {env.name: env.value for env in entry.envs} if entry is not None else {}
    missing = [name for name in version.manifest.env_required if name not in given]
    if missing:
        names = ", ".join(missing)
        text = f"{version.bento} requires the environment variables {names}; give them with the deployment or a secret."
        return Condition("Available", False, "ENV_MISSING", text)
    called = sorted({name for service in version.manifest.services for name in service.deployments})
    if called and not all(name in given for name in CLOUD_ENVS):
        text = (
            f"{version.bento} calls the deployment {', '.join(called)}, for which its replicas need an API token of a "
            f"viewer: give {' and '.join(CLOUD_ENVS)} with a secret."
        )
        return Condition("Available", False, "API_TOKEN_MISSING", text)
    return None


def spec_of(
    deployment: Deployment,
    revision: int,
    version: Version,
    service: str,
    *,
    made: Made,
    secrets: Sequence[identity_pb2.Secret],
    instance_types: Mapping[str, InstanceType],
    drain_s: float,
) -> SetSpec:
    """What the replicas of one service run."""
    manifest = version.manifest
    entry = service == manifest.entry
    template = version.services.get(service, pb.ServiceTemplate())
    size = instance_types.get(template.instance_type)
    pod = pods.pod_of(template, size)
    cpu_millicores, memory_bytes = pods.limits_of(pod.settings, size)
    envs = {
        # A dependency's own defaults are in its code only; it is started with a program that puts them in.
        **(manifest.env_defaults if entry else {}),
        **_secret_envs(secrets),
        **version.envs,
        **{env.name: env.value for env in template.envs},
    }
    overrides = json_format.MessageToDict(template.config_overrides) if template.HasField("config_overrides") else {}
    return SetSpec(
        key=key_of(deployment.uid, revision, version.target, service),
        deployment=f"deployments/{deployment.name}",
        deployment_uid=deployment.uid,
        revision=revision,
        target=version.target,
        service=service,
        entry=entry,
        legacy=manifest.legacy,
        bento=version.bento,
        bento_digest=version.digest,
        models=version.models,
        environment=made.environment,
        image=made.image,
        image_digest=made.digest if made.image else "",
        organization=deployment.organization.rpartition("/")[2],
        model_images=made.model_images,
        pull_secrets=version.pull_secrets,
        envs=envs,
        files=tuple(_secret_files(secrets)),
        config=domain.whole(overrides),
        readiness_path=_path_of("readyz", manifest.service(service).config, overrides),
        liveness_path=_path_of("livez", manifest.service(service).config, overrides),
        dependencies=tuple(
            (name, key_of(deployment.uid, revision, version.target, name))
            for name in manifest.service(service).dependencies
        ),
        cpu_millicores=cpu_millicores,
        memory_bytes=memory_bytes,
        drain_s=pod.settings.termination_grace.seconds or drain_s,
        pod=pod,
        place=deployment.place,
    )


def _path_of(probe: str, *configs: Mapping[str, Any]) -> str:
    """Where the last of the configurations says that `readyz` or `livez` is asked; a `path_prefix` of the service moves
    both."""
    path = f"/{probe}"
    for config in configs:
        endpoints = config.get("endpoints")
        named = endpoints.get(probe) if isinstance(endpoints, Mapping) else None
        if isinstance(named, str) and named.strip("/"):
            path = f"/{named.lstrip('/')}"
    return path


def _runtime(secrets: Sequence[identity_pb2.Secret]) -> list[identity_pb2.Secret]:
    return [secret for secret in secrets if secret.stage != identity_pb2.Secret.BUILD]


def _secret_envs(secrets: Sequence[identity_pb2.Secret]) -> dict[str, str]:
    return {
        item.key: item.value
        for secret in _runtime(secrets)
        if secret.kind != identity_pb2.Secret.MOUNT_FILE
        for item in secret.items
    }


def _secret_files(secrets: Sequence[identity_pb2.Secret]) -> list[SecretFile]:
    return [
        SecretFile(f"{secret.path.rstrip('/')}/{item.sub_path or item.key}", item.value)
        for secret in _runtime(secrets)
        if secret.kind == identity_pb2.Secret.MOUNT_FILE
        for item in secret.items
    ]
