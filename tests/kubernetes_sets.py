"""Replica sets for tests of the Kubernetes runtime whose pods are too large for any node, so that they stay pending."""

import os
from dataclasses import replace

from services.deployer.runtimes import SetSpec


def a_set(**other: object) -> SetSpec:
    """A set that other services call."""
    spec = SetSpec(
        key=f"called{os.urandom(4).hex()}",
        deployment="deployments/iris",
        deployment_uid=os.urandom(4).hex(),
        revision=1,
        target="main",
        service="Iris",
        entry=False,
        legacy=False,
        bento="bentoRepositories/iris/bentos/v1",
        bento_digest=f"sha256:{'ab' * 32}",
        models=(),
        environment="",
        image="localhost/pause:1",
        image_digest=f"sha256:{'ab' * 32}",
        envs={"GREETING": "hello"},
        cpu_millicores=1000,
        memory_bytes=1 << 50,
        drain_s=1,
    )
    return replace(spec, **other)  # type: ignore[arg-type]
