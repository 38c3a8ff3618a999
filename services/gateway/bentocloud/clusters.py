"""Clusters and instance types."""

from collections.abc import Mapping

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.identity.v1 import identity_pb2 as identity
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.auth import organization_reply
from services.gateway.bentocloud.wire import KUBE_NAMESPACE, Reply, last, page, resource

DEFAULT_CLUSTER = "default"
# A cluster has no creator here, and the client insists on one.
_NOBODY = {"name": "ekiben", "email": "", "first_name": "", "last_name": ""}
_GIB = 1 << 30
_MIB = 1 << 20


async def check(call: Call) -> str:
    """The name of the cluster that the query names; the default one where it names none.

    Raises:
        NotFound: there is no such cluster.
    """
    name = call.query("cluster")
    if not name or name == DEFAULT_CLUSTER:
        return DEFAULT_CLUSTER
    await _get(call, name)
    return name


async def list_all(call: Call) -> Reply:
    """GET /api/v1/clusters."""
    found = await call(call.api.instance_types.ListClusters, deployer.ListClustersRequest())
    return page([cluster_reply(cluster) for cluster in found.clusters])


async def get(call: Call) -> Reply:
    """GET /api/v1/clusters/{cluster}: with what 1.0 and 1.1 want to know of Kubernetes, which is nothing."""
    cluster = await _get(call, call.path("cluster"))
    organization = await call(
        call.api.accounts.GetOrganization, identity.GetOrganizationRequest(name="organizations/-")
    )
    return {
        **cluster_reply(cluster),
        "organization": organization_reply(organization),
        "kube_config": "",
        "config": {
            "default_deployment_kube_namespace": next(iter(cluster.namespaces), KUBE_NAMESPACE),
            "ingress_ip": "",
            "aws": "",
        },
        "grafana_root_path": "",
        "resource_instances": [],
    }


async def list_instance_types(call: Call) -> list[Reply]:
    """GET /api/v1/instance_types: a bare array."""
    cluster = await check(call)
    request = deployer.ListInstanceTypesRequest(cluster=f"clusters/{cluster}")
    found = await call(call.api.instance_types.ListInstanceTypes, request)
    return [instance_type_reply(each) for each in found.instance_types]


def cluster_reply(cluster: deployer.Cluster) -> Reply:
    """A cluster. The default one is the first, so that the client's links to pages need only a deployment's name."""
    return {
        **resource("cluster", last(cluster.name), cluster.uid, created=cluster.create_time),
        "description": cluster.description,
        "organization_name": "default",
        "creator": _NOBODY,
        "is_first": last(cluster.name) == DEFAULT_CLUSTER,
    }


def instance_type_reply(size: deployer.InstanceType) -> Reply:
    """An instance type; users give its display name as `--instance-type`."""
    whole = {
        "cpu": f"{size.cpu_millicores}m" if size.cpu_millicores % 1000 else str(size.cpu_millicores // 1000),
        "memory": _memory(size.memory_bytes),
        "gpu": str(size.gpu_count) if size.gpu_count else None,
    }
    given = size.pod.resources
    return {
        **resource("resource_instance", last(size.name), last(size.name)),
        "display_name": size.display_name,
        "description": size.description,
        "config": {
            "group": size.group or ("gpu" if size.gpu_count else "cpu"),
            "price": size.price or "0",
            "resources": {
                "requests": _resources(whole, {**given.limits, **given.requests}),
                "limits": _resources(whole, given.limits),
            },
            "node_selectors": dict(size.pod.node_selector),
            "gpu_config": {"type": size.gpu_type, "memory": ""} if size.gpu_count else None,
        },
    }


def _resources(whole: Reply, named: Mapping[str, str]) -> Reply:
    """Cores, memory and GPUs by the client's names, where nothing else is said of them, and all else as `custom`."""
    custom = {name: amount for name, amount in named.items() if name not in ("cpu", "memory", "nvidia.com/gpu")}
    known = {name: named[name] for name in ("cpu", "memory") if name in named}
    return {**whole, **known, "custom": custom or None}


def _memory(size_bytes: int) -> str:
    return f"{size_bytes // _GIB}Gi" if size_bytes % _GIB == 0 else f"{size_bytes // _MIB}Mi"


async def _get(call: Call, name: str) -> deployer.Cluster:
    request = deployer.GetClusterRequest(name=str(names.Cluster(name)))
    return await call(call.api.instance_types.GetCluster, request)
