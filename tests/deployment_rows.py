"""Rows of deployments and revisions as the API writes them, for tests."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import messages
from services.deployer.domain import DEFAULT_CLUSTER, MAIN, Bento, Deployment, Revision, Status

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
BENTO = "bentoRepositories/iris/bentos/v1"


def a_deployment(name: str = "iris", *, scaling: Mapping[str, pb.Scaling] | None = None, **values: Any) -> Deployment:
    """One that was just made, but for these values."""
    made = Deployment(
        name=name,
        uid=f"uid-{name}",
        organization="organizations/default",
        labels={},
        cluster=DEFAULT_CLUSTER,
        scaling=messages.scaling_json(scaling or {}),
        capture="",
        access_authorization=False,
        dev=False,
        generation=1,
        latest_revision=1,
        terminated=False,
        deleting=False,
        port=0,
        build="",
        traceparent="",
        creator="users/admin",
        create_time=NOW,
        update_time=NOW,
        status=Status("DEPLOYING"),
    )
    return replace(made, **values)


def a_revision(
    of: Deployment, template: pb.Template | None = None, *, number: int = 1, bento: Bento | None = None
) -> Revision:
    """One of a deployment. All its targets are the same bento."""
    bento = a_bento() if bento is None else bento
    template = pb.Template(bento=bento.name) if template is None else template
    bentos = dict.fromkeys((MAIN, *template.canary.versions), bento)
    uid, text = f"revision-{of.uid}-{number}", messages.template_json(template)
    return Revision(of.uid, number, uid, text, bentos, "users/admin", NOW)


def a_bento(*called: str, **config: Any) -> Bento:
    """One whose entry service, Iris, has this configuration and calls these services."""
    entry = {"name": "Iris", "config": config, "dependencies": [{"service": name} for name in called]}
    services = [entry, *({"name": name} for name in called)]
    return Bento(BENTO, f"sha256:{'cd' * 32}", json.dumps({"entry_service": "Iris", "services": services}))
