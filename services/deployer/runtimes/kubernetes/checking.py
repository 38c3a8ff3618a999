"""Whether a cluster would take what a deployment says of its pods: asked by dry runs, so that nothing is changed.

A cluster judges much only when a pod is made (pod security, limit ranges, priority and runtime classes): so a pod is
tried beside the objects that are applied. Not said is what may change by itself: whether a node has room, whether a
quota is used up.
"""

import contextlib
from collections.abc import Collection
from dataclasses import replace

from ekiben.errors import EkibenError, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from services.deployer.runtimes import Pod, SetSpec
from services.deployer.runtimes.kubernetes import objects
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.names import Object, Where, name_of
from services.deployer.runtimes.kubernetes.placement import USABLE, borrowed, images, login_names, used
from services.deployer.runtimes.kubernetes.security import faults
from services.deployer.runtimes.kubernetes.volumes import explained

NOBODY = "default"
"""The service account with which a pod is tried: its own is not there yet."""


async def check(api: Api, spec: SetSpec, where: Where, pull_host: str) -> None:
    """See the module.

    Raises:
        InvalidArgument: the cluster would not take it (KUBERNETES_REFUSED), in its own words; or something that it uses
            is not there, or does not or cannot say that it may be used (OBJECT_NOT_USABLE); or a patch makes more of
            the pod than the platform allows (POD_SECURITY).
        PermissionDenied, Unavailable: the cluster cannot be asked.
    """
    image = f"{pull_host or 'registry.invalid'}/ekiben/not-built@sha256:{'0' * 64}"
    spec = replace(spec, image=image)
    made = objects.objects(spec, 1, where, "")
    pod = spec.pod
    settled = not pod.settings.ListFields() and not pod.extra and not pod.patch
    if settled and not spec.model_images and not spec.pull_secrets:
        return
    for name in spec.pull_secrets:
        await _usable(api, "Secret", name)
    template = objects.template_of(spec, where)
    if wrong := faults(template, where.pod_security):
        raise InvalidArgument(
            f"The pod is more than {where.pod_security}, the pod security level that this platform allows: "
            f"{'; '.join(wrong)}. Leave that out, or have whoever runs the platform set kubernetes_pod_security.",
            reason="POD_SECURITY",
            level=where.pod_security,
        )
    if strange := list(borrowed(template, where.pod_security)):
        raise InvalidArgument(
            f"The pod would have data of which nobody says that deployments may use it: {'; '.join(strange)}. Copy or "
            f"mount a PersistentVolumeClaim instead, whose owner can: kubectl label persistentvolumeclaim NAME "
            f"{USABLE}=true",
            reason="OBJECT_NOT_USABLE",
            service=spec.service,
        )
    plain = objects.template_of(replace(spec, pod=Pod()), where)
    _signed(spec, where, images(template) - images(plain))
    for kind, name in sorted(set(used(template, name_of(spec.key), login_names(plain["spec"])))):
        await _usable(api, kind, name)
    for each in (objects.anchor(spec, where), *made):
        each["metadata"].pop("ownerReferences", None)
        try:
            await api.apply(each, dry_run=True)
        except ResourceExhausted:
            pass
        except EkibenError as exc:
            raise explained(exc, spec) from exc
    await _try_pod(api, spec, where, template)


def _signed(spec: SetSpec, where: Where, strange: Collection[str]) -> None:
    if where.signed_only and strange:
        raise InvalidArgument(
            f"The patch of the pod has images of which nobody looks at signatures: {', '.join(sorted(strange))}. This "
            "platform runs signed images only (image_policy is enforce). Leave them out.",
            reason="IMAGE_NOT_SIGNED",
            service=spec.service,
        )


async def _usable(api: Api, kind: str, name: str) -> None:
    try:
        found = await api.read(kind, name)
    except NotFound:
        raise InvalidArgument(
            f"There is no {kind} {name} in the namespace of the deployment; make it first, or name another.",
            reason="OBJECT_NOT_USABLE",
            kind=kind,
            name=name,
        ) from None
    if (found["metadata"].get("labels") or {}).get(USABLE) != "true":
        raise InvalidArgument(
            f"The {kind} {name} does not say that deployments may use it. Whoever owns it can: "
            f"kubectl label {kind.lower()} {name} {USABLE}=true",
            reason="OBJECT_NOT_USABLE",
            kind=kind,
            name=name,
        )


async def _try_pod(api: Api, spec: SetSpec, where: Where, template: Object) -> None:
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": name_of(spec.key), "namespace": where.namespace},
        "spec": {**template["spec"]},
    }
    if pod["spec"].get("serviceAccountName") == name_of(spec.key):
        pod["spec"]["serviceAccountName"] = NOBODY
    # A role need not allow to make pods, which Deployments do; then the pods themselves tell later.
    with contextlib.suppress(ResourceExhausted, PermissionDenied):
        await api.try_create(pod)
