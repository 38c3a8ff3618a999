"""Whether a revision could ever run where its deployment is: asked of the runtime before it is written."""

from collections.abc import Mapping

from services.deployer import specs
from services.deployer.builds import Made
from services.deployer.domain import Deployment, InstanceType, Revision
from services.deployer.runtimes import Runtime

NOT_BUILT = Made("sha256:" + "0" * 64)
"""What it will run is built only afterwards."""


class Acceptance:
    """See the module."""

    def __init__(self, runtime: Runtime, instance_types: Mapping[str, InstanceType], drain_s: float) -> None:
        self._runtime, self._instance_types, self._drain_s = runtime, instance_types, drain_s

    async def __call__(self, deployment: Deployment, revision: Revision) -> None:
        """Raises InvalidArgument in the words of the runtime, or of the cluster."""
        for version in specs.versions_of(revision):
            for service in version.manifest.services:
                spec = specs.spec_of(
                    deployment,
                    revision.number,
                    version,
                    service.name,
                    made=NOT_BUILT,
                    secrets=[],
                    instance_types=self._instance_types,
                    drain_s=self._drain_s,
                )
                await self._runtime.check(spec)
