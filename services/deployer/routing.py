"""What is seen of a deployment to its route. Pure."""

from collections.abc import Collection, Mapping, Sequence

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import messages, status
from services.deployer.domain import MAIN, Deployment, Revision
from services.deployer.runtimes import Phase, SetStatus
from services.deployer.specs import Version

SHARES = 100
"""A weight is multiplied by this before it is shared among revisions, so that the shares stay whole."""


def route_of(
    deployment: Deployment,
    latest: Revision,
    versions: Mapping[int, Sequence[Version]],
    sets: Sequence[SetStatus],
    hosts: Sequence[str],
) -> pb.Route:
    """Where requests to a deployment go.

    Args:
        deployment: which.
        latest: its newest revision.
        versions: those of the latest revision, and of each that has a set, by its number.
        sets: what runs of it.
        hosts: the host names that lead to it.
    """
    route = pb.Route(
        deployment=f"deployments/{deployment.name}",
        uid=deployment.uid,
        organization=deployment.organization,
        hosts=hosts,
        port=deployment.port,
        access_authorization=deployment.access_authorization,
        capture=messages.capture(deployment.capture),
        not_ready_detail=_not_ready(deployment),
    )
    canary = messages.template(latest.template).canary
    route.route_type, route.route_by = canary.route_type, canary.route_by
    weights = {version.target: version.weight for version in versions[latest.number]}
    alone = set() if deployment.terminated else _without_ready(sets)
    for one in sorted(sets, key=lambda one: (one.target != MAIN, one.target, one.revision, one.service)):
        endpoints = [
            pb.Endpoint(replica=replica.replica, address=replica.address)
            for replica in one.replicas
            if replica.phase is Phase.READY or (replica.serving and (one.target, one.service) in alone)
        ]
        name = f"deployments/{deployment.name}/revisions/{one.revision}"
        version = next((each for each in versions[one.revision] if each.target == one.target), None)
        if version is None:
            continue
        if one.service != version.manifest.entry:
            route.internal_routes.add(
                revision=name,
                service=one.service,
                socket_path=one.socket_path,
                endpoints=endpoints,
                target=one.target,
            )
        elif endpoints and one.target in weights:
            route.targets.add(
                target=one.target,
                revision=name,
                bento=version.bento,
                models=[model for model, _ in version.models],
                weight=weights[one.target] * SHARES,
                service=one.service,
                endpoints=endpoints,
            )
    _share(route)
    return route


def without(route: pb.Route, replicas: Collection[str]) -> pb.Route:
    """The same route without these replicas, as the platform stops."""
    kept = pb.Route()
    kept.CopyFrom(route)
    for endpoints in [*(one.endpoints for one in kept.targets), *(one.endpoints for one in kept.internal_routes)]:
        for endpoint in [one for one in endpoints if one.replica in replicas]:
            endpoints.remove(endpoint)
    targets = [target for target in kept.targets if target.endpoints]
    kept.ClearField("targets")
    kept.targets.extend(targets)
    kept.not_ready_detail = "The platform is stopping."
    return kept


def _not_ready(deployment: Deployment) -> str:
    if deployment.terminated:
        return f"deployments/{deployment.name} was terminated."
    for condition in deployment.status.conditions:
        if condition.type == "Available" and condition.status is False:
            return f"deployments/{deployment.name} is not available. {status.without_lines(condition.message)}"
    return f"deployments/{deployment.name} is starting."


def _without_ready(sets: Sequence[SetStatus]) -> set[tuple[str, str]]:
    """Targets and services of which no replica is ready: leaving ones that still answer get the requests meanwhile."""
    ready = {(one.target, one.service) for one in sets if one.count(Phase.READY)}
    return {(one.target, one.service) for one in sets} - ready


def _share(route: pb.Route) -> None:
    """Share the weight of a target among its revisions by their endpoints, for the time of a rollout."""
    total: dict[str, int] = {}
    for target in route.targets:
        total[target.target] = total.get(target.target, 0) + len(target.endpoints)
    for target in route.targets:
        target.weight = target.weight * len(target.endpoints) // total[target.target]
