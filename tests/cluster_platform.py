"""`ekiben up` whose replicas are pods of a test's cluster, and whose images the nodes pull from it."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.base_image import base_image
from tests.cluster import Cluster
from tests.platform import Platform


@contextlib.contextmanager
def new_namespace(cluster: Cluster, prefix: str) -> Iterator[str]:
    """A namespace while inside, with the restricted pod security standard enforced."""
    name = f"{prefix}-{os.urandom(4).hex()}"
    cluster.kubectl("create", "namespace", name)
    try:
        cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)


@contextlib.contextmanager
def platform_on(
    cluster: Cluster, namespace: str, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Platform]:
    """A platform while inside; `env` has what its settings are besides or instead."""
    with cluster.passage() as passage:
        settings = {
            "EKIBEN_BUILDER_BASES": base_image(),
            "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system",
            "EKIBEN_DEPLOYER_RUNTIME": "kubernetes",
            "EKIBEN_DEPLOYER_KUBECONFIG": str(cluster.kubeconfig),
            "EKIBEN_DEPLOYER_KUBERNETES_NAMESPACE": namespace,
            "EKIBEN_DEPLOYER_KUBERNETES_PULL_HOST": passage.name,
            "EKIBEN_DEPLOYER_DRAIN_S": "5",
        }
        up = Platform(folder / "data", env=settings | dict(env or {}))
        try:
            up.start()
            with passage.to(f"127.0.0.1:{up.port}"):
                yield up
        finally:
            up.close()
