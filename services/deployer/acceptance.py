"""Whether a revision could ever run where its deployment is: asked of the runtime before it is written."""

from collections.abc import Mapping
from dataclasses import replace

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import scaling, specs
from services.deployer.builds import Made
from services.deployer.domain import Deployment, InstanceType, Revision
from services.deployer.runtimes import Runtime

NOT_BUILT = Made("sha256:" + "0" * 64)
"""What it will run is built only afterwards."""


class Acceptance:
    """See the module."""

    def __init__(
        self,
        runtime: Runtime,
        instance_types: Mapping[str, InstanceType],
        metric_names: Mapping[str, str],
        drain_s: float,
    ) -> None:
        self._runtime, self._drain_s = runtime, drain_s
        self._instance_types, self._metric_names = instance_types, metric_names

    async def __call__(self, deployment: Deployment, revision: Revision) -> None:
        """Raises InvalidArgument in the words of the runtime, or of the cluster."""
        for version in specs.versions_of(revision):
            apart = tuple((model, NOT_BUILT.digest) for model, _ in version.models) if version.models_apart else ()
            for service in version.manifest.services:
                spec = specs.spec_of(
                    deployment,
                    revision.number,
                    version,
                    service.name,
                    made=replace(NOT_BUILT, model_images=apart),
                    secrets=[],
                    instance_types=self._instance_types,
                    drain_s=self._drain_s,
                )
                size = self._instance_types.get(version.services.get(service.name, pb.ServiceTemplate()).instance_type)
                asked = specs.scaling_of(deployment, version, service.name)
                scaled = (
                    scaling.autoscaling_of(asked, size, self._metric_names)
                    if self._runtime.scales(deployment.place)
                    else None
                )
                await self._runtime.check(replace(spec, autoscaling=scaled))
