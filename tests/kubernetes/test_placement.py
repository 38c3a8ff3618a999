"""Where pods run and with what, on two real nodes. No container starts: only where pods go and how they look is asked."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kubernetes_asyncio import client, config

from ekiben.deployer.v1.pods_pb2 import PodSettings
from ekiben.errors import EkibenError, InvalidArgument, Unavailable
from services.deployer.runtimes import Pod, SecretFile, SetSpec
from services.deployer.runtimes.kubernetes.names import SET, Where, name_of
from services.deployer.runtimes.kubernetes.objects import objects
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from services.deployer.runtimes.kubernetes.strategic import MERGE_KEYS, merged
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.fixtures_kernel import until
from tests.platform import free_port

SECRET = "hub"


@pytest.fixture(scope="module")
def where(cluster: Cluster) -> Iterator[Where]:
    """A namespace of this module's own, with the restricted pod security standard enforced."""
    with new_namespace(cluster, "placement") as name:
        cluster.kubectl("create", "secret", "generic", SECRET, "--from-literal=KEY=value", "-n", name)
        cluster.kubectl("label", "secret", SECRET, "ekiben.dev/usable=true", "-n", name)
        cluster.kubectl("create", "secret", "generic", "closed", "--from-literal=KEY=value", "-n", name)
        yield Where(os.urandom(4).hex(), name, pod_security="privileged")


@asynccontextmanager
async def running(cluster: Cluster, where: Where) -> AsyncIterator[KubernetesRuntime]:
    async with open_kubernetes_runtime(cluster.kubeconfig, "", where) as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        yield runtime


def spec(settings: Any = None, patch: Any = None) -> SetSpec:
    """A set of which nothing can be pulled."""
    return SetSpec(
        key=f"placed{os.urandom(5).hex()}",
        deployment="deployments/placed",
        deployment_uid=os.urandom(4).hex(),
        revision=1,
        target="main",
        service="Placed",
        entry=True,
        legacy=False,
        bento="bentoRepositories/placed/bentos/v1",
        bento_digest="",
        models=(),
        environment="",
        image="docker://127.0.0.1:1/nothing:v1",
        image_digest=f"sha256:{'0' * 64}",
        memory_bytes=16 << 20,
        drain_s=1,
        pod=Pod(json_format.ParseDict(settings or {}, PodSettings()), patch=patch or {}),
    )


def pods_of(cluster: Cluster, where: Where, one: SetSpec) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.get("pods", "-n", where.namespace, "-l", f"{SET}={one.key}")["items"]
    return found


def nodes(cluster: Cluster, where: Where, one: SetSpec, count: int, into: list[str]) -> Callable[[], Awaitable[bool]]:
    async def probe() -> bool:
        found = [pod["spec"].get("nodeName", "") for pod in pods_of(cluster, where, one)]
        into[:] = sorted(found)
        return len(found) == count and all(found)

    return probe


@asynccontextmanager
async def placed(cluster: Cluster, where: Where, one: SetSpec, replicas: int) -> AsyncIterator[list[str]]:
    """The nodes on which the pods of a set come to be; it is taken away afterwards."""
    found: list[str] = []
    async with running(cluster, where) as runtime:
        await runtime.check(one)
        await runtime.apply(one, replicas)
        await until(nodes(cluster, where, one, replicas, found), "all pods have a node", 60)
        yield found
        await runtime.scale(one.key, 0)
        cluster.kubectl("delete", "deployment", name_of(one.key), "-n", where.namespace, check=False)


@contextmanager
def labelled(cluster: Cluster, node: str) -> Iterator[str]:
    """A label that only this node has."""
    name = f"test-{os.urandom(4).hex()}"
    cluster.kubectl("label", "node", node, f"{name}=yes")
    try:
        yield name
    finally:
        cluster.kubectl("label", "node", node, f"{name}-", check=False)


async def test_pods_go_where_selector_affinity_and_spread_say(cluster: Cluster, where: Where) -> None:
    with labelled(cluster, "node-2") as label:
        async with placed(cluster, where, spec({"node_selector": {label: "yes"}}), 2) as found:
            assert found == ["node-2", "node-2"]
        terms = [{"matchExpressions": [{"key": label, "operator": "DoesNotExist"}]}]
        affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
        async with placed(cluster, where, spec({"affinity": affinity}), 2) as found:
            assert found == ["node-1", "node-1"]
    spread = {"topology_spread": [{"topology_key": "kubernetes.io/hostname"}]}
    async with placed(cluster, where, spec(spread), 2) as found:
        assert found == ["node-1", "node-2"]


@asynccontextmanager
async def core(cluster: Cluster) -> AsyncIterator[client.ApiClient]:
    settings = client.Configuration()
    await config.load_kube_config(str(cluster.kubeconfig), client_configuration=settings)
    async with client.ApiClient(settings) as api:
        yield api


@asynccontextmanager
async def advertised(cluster: Cluster, node: str) -> AsyncIterator[str]:
    """A resource of which this node has one."""
    name = f"example.com/device-{os.urandom(4).hex()}"
    path = f"/status/capacity/{name.replace('/', '~1')}"
    async with core(cluster) as api:
        nodes = client.CoreV1Api(api)
        await nodes.patch_node_status(node, [{"op": "add", "path": path, "value": "1"}])
        try:
            yield name
        finally:
            await nodes.patch_node_status(node, [{"op": "remove", "path": path}])


async def test_an_extended_resource_by_name_decides_the_node_and_how_many(cluster: Cluster, where: Where) -> None:
    async with advertised(cluster, "node-2") as resource:
        one = spec({"resources": {"limits": {resource: "1"}}})
        async with placed(cluster, where, one, 1) as found:
            assert found == ["node-2"]
            async with running(cluster, where) as runtime:
                await runtime.apply(one, 2)

                async def told() -> bool:
                    (seen,) = [each for each in await runtime.observe() if each.key == one.key]
                    return any(f"Insufficient {resource}" in each.message for each in seen.replicas)

                await until(told, "there is no second one", 60)


async def test_a_device_claim_decides_the_node(cluster: Cluster, where: Where) -> None:
    name = f"test-{os.urandom(4).hex()}"
    device = {"apiVersion": "resource.k8s.io/v1"}
    selector = {"cel": {"expression": f'device.driver == "{name}.example.com"'}}
    request = {"name": "one", "exactly": {"deviceClassName": name}}
    made = [
        {**device, "kind": "DeviceClass", "metadata": {"name": name}, "spec": {"selectors": [selector]}},
        {
            **device,
            "kind": "ResourceSlice",
            "metadata": {"name": name},
            "spec": {
                "driver": f"{name}.example.com",
                "nodeName": "node-1",
                "pool": {"name": name, "generation": 1, "resourceSliceCount": 1},
                "devices": [{"name": "device-0"}],
            },
        },
        {
            **device,
            "kind": "ResourceClaimTemplate",
            "metadata": {"name": name, "namespace": where.namespace},
            "spec": {"spec": {"devices": {"requests": [request]}}},
        },
    ]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": made})
    cluster.kubectl("apply", "--validate=false", "-f", "-", input=listed)
    try:
        one = spec({"resources": {"claims": [{"template": name, "request": "one"}]}})
        async with placed(cluster, where, one, 1) as found:
            assert found == ["node-1"]
    finally:
        cluster.kubectl("delete", "deviceclass,resourceslice", name, check=False)


BAD: list[tuple[Any, Any, str]] = [
    ({"priority_class": "no-such-class"}, None, "no PriorityClass with name no-such-class"),
    ({"runtime_class": "no-such-class"}, None, '"no-such-class" not found'),
    ({"labels": {"team": "a b"}}, None, "a valid label must be"),
    ({"tolerations": [{"key": "a", "operator": "Maybe"}]}, None, "Maybe"),
    ({"topology_spread": [{"topology_key": "zone", "when_unsatisfiable": "Never"}]}, None, "Never"),
    ({"affinity": {"nodeAffinities": {}}}, None, "nodeAffinities"),
    ({"resources": {"requests": {"memory": "1Gi"}}}, None, "must be less than or equal to memory limit"),
    ({"resources": {"limits": {"example.com/gpu": "0.5"}}}, None, "must be an integer"),
    ({"env_from": [{"secret": "closed"}]}, None, "kubectl label secret closed ekiben.dev/usable=true"),
    ({"mounts": [{"path": "/data", "claim": "lost"}]}, None, "no PersistentVolumeClaim lost"),
    (None, {"spec": {"serviceAccountName": "default"}}, "kubectl label serviceaccount default"),
    (None, {"spec": {"serviceAccountName": None, "serviceAccount": "default"}}, "kubectl label serviceaccount default"),
    (None, {"spec": {"imagePullSecrets": [{"name": "closed"}]}}, "kubectl label secret closed"),
    (None, {"spec": {"hostNetwork": True}}, 'violates PodSecurity "restricted:latest"'),
    (
        None,
        {"spec": {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}},
        'violates PodSecurity "restricted:latest"',
    ),
    (None, {"spec": {"containers": [{"name": "bento", "imagee": "x"}]}}, "imagee"),
    (None, {"spec": {"containers": [{"name": "beside"}]}}, "image: Required value"),
]


async def test_what_the_cluster_would_not_take_is_refused_in_its_own_words(cluster: Cluster, where: Where) -> None:
    async with running(cluster, where) as runtime:
        for settings, patch, words in BAD:
            with pytest.raises(InvalidArgument) as caught:
                await runtime.check(spec(settings, patch))
            assert words in caught.value.message, (settings, patch)
        usable = spec({"env_from": [{"secret": SECRET}], "mounts": [{"path": "/hub", "secret": SECRET}]})
        await runtime.check(usable)
    left = cluster.get("deployments,pods,services,secrets", "-n", where.namespace, "-l", f"{SET}={usable.key}")
    assert not left["items"]


OURS = {"name": "bento"}
SECURITY: list[dict[str, Any]] = [
    {},
    {"hostPID": True},
    {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]},
    {"volumes": [{"name": "x", "nfs": {"server": "a", "path": "/"}}]},
    {"volumes": [{"name": "x", "projected": {"sources": [{"configMap": {"name": "c"}}]}}]},
    {"securityContext": {"runAsNonRoot": False}},
    {"securityContext": {"runAsUser": 0}},
    {"securityContext": {"seccompProfile": {"type": "Unconfined"}}},
    {"securityContext": {"sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}]}},
    {"securityContext": {"sysctls": [{"name": "net.core.somaxconn", "value": "1"}]}},
    {"securityContext": {"seLinuxOptions": {"type": "container_t", "level": "s0"}}},
    {"securityContext": {"seLinuxOptions": {"role": "x"}}},
    {"containers": [{**OURS, "securityContext": {"allowPrivilegeEscalation": None}}]},
    {"containers": [{**OURS, "securityContext": {"privileged": True, "allowPrivilegeEscalation": True}}]},
    {"containers": [{**OURS, "securityContext": {"capabilities": {"add": ["NET_BIND_SERVICE"]}}}]},
    {"containers": [{**OURS, "securityContext": {"capabilities": {"add": ["CHOWN"]}}}]},
    {"containers": [{**OURS, "securityContext": {"capabilities": {"drop": ["KILL"]}}}]},
    {"containers": [{**OURS, "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}]},
    {"containers": [{**OURS, "securityContext": {"appArmorProfile": {"type": "Unconfined"}}}]},
    {"containers": [{**OURS, "ports": [{"containerPort": 3000, "hostPort": 3000}]}]},
    {"containers": [{**OURS, "livenessProbe": {"httpGet": {"host": "10.0.0.1"}}}]},
    {"containers": [{"name": "beside", "image": "b:1"}]},
    {"initContainers": [{"name": "first", "image": "f:1", "securityContext": {"runAsUser": 0}}]},
]


async def test_the_platform_holds_pods_to_a_level_as_the_cluster_does(cluster: Cluster, where: Where) -> None:
    """The namespace enforces restricted: what our own check says is what admission says."""
    async with running(cluster, where) as theirs, running(cluster, replace(where, pod_security="restricted")) as ours:
        for patch in SECURITY:
            one = spec({"labels": {"a": "b"}}, {"spec": patch} if patch else {})
            said = [await _refusal(runtime, one) for runtime in (ours, theirs)]
            assert ("POD_SECURITY" in said[0]) == ("violates PodSecurity" in said[1]), (patch, said)


async def _refusal(runtime: KubernetesRuntime, one: SetSpec) -> str:
    try:
        await runtime.check(one)
    except InvalidArgument as exc:
        return f"{exc.reason} {exc.message}"
    return ""


async def test_where_images_must_be_signed_a_patch_brings_none(cluster: Cluster, where: Where) -> None:
    async with running(cluster, replace(where, signed_only=True)) as runtime:
        await runtime.check(spec(None, {"spec": {"hostname": "h"}}))
        with pytest.raises(InvalidArgument) as caught:
            await runtime.check(spec(None, {"spec": {"containers": [{"name": "bento", "image": "mine:1"}]}}))
        assert caught.value.reason == "IMAGE_NOT_SIGNED" and "mine:1" in caught.value.message


async def test_while_the_api_is_away_no_pod_settings_are_accepted(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    away = yaml.safe_load(cluster.kubeconfig.read_text())
    away["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{free_port()}"
    kubeconfig = tmp_path / "away.kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(away))
    async with open_kubernetes_runtime(kubeconfig, "", where) as runtime:
        await runtime.check(spec())
        with pytest.raises(Unavailable):
            await runtime.check(spec({"edge": True}))


async def test_a_used_up_quota_does_not_keep_a_revision_out(cluster: Cluster, where: Where) -> None:
    cluster.kubectl("create", "quota", "none", "--hard=count/deployments.apps=0,pods=0", "-n", where.namespace)
    try:
        async with running(cluster, where) as runtime:
            await runtime.check(spec({"labels": {"team": "a"}}))
    finally:
        cluster.kubectl("delete", "quota", "none", "-n", where.namespace)


async def test_the_patch_wins_in_the_pods_and_a_deployer_that_starts_anew_changes_nothing(
    cluster: Cluster, where: Where
) -> None:
    patch = {
        "metadata": {"annotations": {"team": "a"}},
        "spec": {
            "terminationGracePeriodSeconds": 7,
            "containers": [
                {"name": "bento", "resources": {"limits": {"cpu": "0.25"}}, "env": [{"name": "HOME", "value": "/x"}]}
            ],
        },
    }
    one = spec({"annotations": {"team": "b"}, "envs": [{"name": "NODE", "field": "spec.nodeName"}]}, patch)
    async with placed(cluster, where, one, 1):
        (pod,) = pods_of(cluster, where, one)
        (container,) = pod["spec"]["containers"]
        assert pod["metadata"]["annotations"]["team"] == "a"
        assert pod["spec"]["terminationGracePeriodSeconds"] == 7
        assert container["resources"]["limits"]["cpu"] == "250m"
        assert {"name": "HOME", "value": "/x"} in container["env"]
        live = ("deployment", name_of(one.key), "-n", where.namespace)
        generation = cluster.get(*live)["metadata"]["generation"]
        async with running(cluster, where) as runtime:
            await runtime.apply(one, 1)
            await asyncio.wait_for(runtime.settled(), 30)
        assert cluster.get(*live)["metadata"]["generation"] == generation


PATCHES: list[dict[str, Any]] = [
    {
        "spec": {
            "containers": [{"name": "bento", "env": [{"name": "HOME", "value": "/y"}, {"name": "NEW", "value": "1"}]}]
        }
    },
    {"spec": {"containers": [{"name": "bento", "env": [{"name": "HOME", "$patch": "delete"}], "command": ["x"]}]}},
    {"spec": {"containers": [{"name": "bento", "ports": [{"containerPort": 9000, "name": "more"}]}]}},
    {"spec": {"containers": [{"name": "bento", "resources": None, "livenessProbe": {"periodSeconds": 3}}]}},
    {
        "spec": {
            "containers": [{"$patch": "replace"}, {"name": "bento", "image": "other:1"}],
            "volumes": [{"$patch": "replace"}],
        }
    },
    {
        "spec": {
            "containers": [{"name": "beside", "image": "b:1"}],
            "initContainers": [{"name": "first", "image": "f:1"}],
        }
    },
    {"spec": {"volumes": [{"name": "temporary", "emptyDir": {"medium": "Memory"}}, {"name": "v", "emptyDir": {}}]}},
    {"spec": {"volumes": [{"name": "temporary", "$retainKeys": ["name", "configMap"], "configMap": {"name": "c"}}]}},
    {"spec": {"securityContext": {"$patch": "replace", "runAsUser": 7}}},
    {"spec": {"tolerations": [{"key": "other", "operator": "Exists"}], "nodeSelector": {"a": None, "b": "2"}}},
    {"spec": {"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["z"]}, {"ip": "10.0.0.2", "hostnames": ["y"]}]}},
    {"spec": {"topologySpreadConstraints": [{"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]}},
    {"spec": {"imagePullSecrets": [{"name": "more"}], "resourceClaims": [{"name": "c", "resourceClaimName": "r"}]}},
    {"spec": {"affinity": {"$patch": "delete"}, "schedulingGates": [{"name": "example.com/gate"}]}},
    {"metadata": {"labels": {"team": None, "new": "1"}, "annotations": {"a": "b"}}},
]


async def test_patches_are_merged_as_the_api_server_merges_them(cluster: Cluster, where: Where) -> None:
    settings = {
        "labels": {"team": "a"},
        "node_selector": {"a": "1"},
        "tolerations": [{"key": "mine", "operator": "Exists"}],
        "topology_spread": [{"topology_key": "zone", "max_skew": 2}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    }
    base = {"spec": {"hostAliases": [{"ip": "10.0.0.1", "hostnames": ["x"]}]}}
    one = replace(spec(settings, base), image="registry.invalid/x:1")
    made = next(
        each for each in objects(one, 0, replace(where, pull_secret="pull"), "") if each["kind"] == "Deployment"
    )
    del made["metadata"]["ownerReferences"]
    cluster.kubectl("create", "-f", "-", input=json.dumps(made))
    name = name_of(one.key)
    live = cluster.get("deployment", name, "-n", where.namespace)
    async with core(cluster) as api:
        apps = client.AppsV1Api(api)
        for patch in PATCHES:
            headers = {"_content_type": "application/strategic-merge-patch+json", "dry_run": "All"}
            theirs = await apps.patch_namespaced_deployment(
                name, where.namespace, {"spec": {"template": patch}}, **headers, _preload_content=False
            )
            ours = {**live, "spec": {**live["spec"], "template": merged(live["spec"]["template"], patch)}}
            taken = await apps.replace_namespaced_deployment(
                name, where.namespace, ours, dry_run="All", _preload_content=False
            )
            expected, found = json.loads(await theirs.read()), json.loads(await taken.read())
            assert "spec" in expected and "spec" in found, (patch, expected, found)
            assert _sorted(found["spec"]["template"]) == _sorted(expected["spec"]["template"]), patch


def _sorted(value: Any, key: str = "") -> Any:
    """Without the order of lists whose items are known by a name."""
    if isinstance(value, dict):
        return {name: _sorted(each, name) for name, each in value.items()}
    if isinstance(value, list):
        found = [_sorted(each) for each in value]
        return sorted(found, key=lambda each: str(each[MERGE_KEYS[key]])) if key in MERGE_KEYS else found
    return value


async def test_a_secret_file_that_cannot_be_mounted_is_a_fault_of_its_set_only(cluster: Cluster, where: Where) -> None:
    broken, good = replace(spec(), files=(SecretFile("/a/../b", "x"),)), spec()
    async with running(cluster, where) as runtime:
        with pytest.raises(EkibenError):
            await runtime.check(broken)
        await runtime.apply(broken, 1)
        await runtime.apply(good, 1)
        found: list[str] = []
        await until(nodes(cluster, where, good, 1, found), "the other is there", 60)
        notes = {each.key: each.note for each in await runtime.observe()}
        assert "cannot be mounted" in notes[broken.key] and not notes[good.key]
        await runtime.scale(good.key, 0)
        await runtime.scale(broken.key, 0)
