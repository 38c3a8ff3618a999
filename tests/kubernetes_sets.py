"""Replica sets for tests of the Kubernetes runtime."""

import os
from dataclasses import replace

from services.deployer.runtimes import SetSpec

DIGEST = f"sha256:{'ab' * 32}"
SPEC = SetSpec(
    key="abcdefgh23456789",
    deployment="deployments/iris",
    deployment_uid="3f0a",
    revision=3,
    target="main",
    service="Iris_Classifier",
    entry=True,
    legacy=False,
    bento="bentoRepositories/iris/bentos/v1",
    bento_digest=DIGEST,
    models=(),
    environment="",
    image="docker://registry.example.com/default/iris:v1",
    image_digest=DIGEST,
    envs={"GREETING": "hello"},
    dependencies=(("Scorer", "zyxwvuts76543210"),),
    cpu_millicores=500,
    memory_bytes=1 << 30,
    drain_s=30,
)
"""One as the deployer asks for it."""


def a_set(**other: object) -> SetSpec:
    """A set that other services call, with pods that are too large for any node, so that they stay pending."""
    spec = replace(
        SPEC,
        key=f"called{os.urandom(4).hex()}",
        deployment_uid=os.urandom(4).hex(),
        revision=1,
        service="Iris",
        entry=False,
        image="localhost/pause:1",
        dependencies=(),
        cpu_millicores=1000,
        memory_bytes=1 << 50,
        drain_s=1,
    )
    return replace(spec, **other)  # type: ignore[arg-type]
