"""The chart by real helm on a real cluster: installed, used with the real client, upgraded, rolled back, uninstalled."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

from ekiben.channel import open_channel
from ekiben.deployer.v1 import deployer_pb2, deployer_pb2_grpc
from ekiben.errors import Unavailable
from tests import installing
from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.helm import CHART, EXAMPLES, MISSING, Helm, helm_program
from tests.oci_registry import OciRegistry
from tests.platform import ROOT, BentoMl, http, wait_for
from tests.postgres import PostgresServer
from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
JSON = {"content-type": "application/json"}
SMALL = {"requests": {"cpu": "20m", "memory": "96Mi"}, "limits": {"memory": "1Gi"}}


@pytest.fixture(scope="module")
def helm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm, as the cluster's administrator."""
    program = helm_program()
    if program is None:
        pytest.skip(MISSING)
    return Helm(program, tmp_path_factory.mktemp("helm"), cluster.kubeconfig)


@pytest.fixture(scope="module")
def image(oci_registry: OciRegistry, pull_host: str) -> Mapping[str, str]:
    """The platform's own image, made by its own builder, as nodes call it: what the chart wants to know."""
    repository = oci_registry.new_repository("ekiben")
    digest = installing.platform_image(f"docker://{oci_registry.host}/{repository}:v1", oci_registry.host)
    return {"repository": f"{pull_host}/{repository}", "digest": digest}


def another(oci_registry: OciRegistry, image: Mapping[str, str]) -> str:
    """The digest of an image that is another one, as that of a next release is: here by a label alone."""
    at = f"http://{oci_registry.host}/v2/{image['repository'].partition('/')[2]}"
    manifest = http("GET", f"{at}/manifests/{image['digest']}", headers={"accept": MANIFEST}).json()
    config = http("GET", f"{at}/blobs/{manifest['config']['digest']}").json()
    config["config"]["Labels"]["org.opencontainers.image.version"] = "another"
    data = json.dumps(config).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    where = http("POST", f"{at}/blobs/uploads/").headers["Location"]
    where = f"{where}{'&' if '?' in where else '?'}digest={digest}"
    binary = {"content-type": "application/octet-stream"}
    assert http("PUT", urljoin(f"{at}/", where), data, binary).status == 201
    manifest["config"] |= {"digest": digest, "size": len(data)}
    pushed = http("PUT", f"{at}/manifests/another", json.dumps(manifest).encode(), {"content-type": MANIFEST})
    assert pushed.status == 201, pushed
    return pushed.headers["Docker-Content-Digest"]


def values_of(cluster: Cluster, image: Mapping[str, str]) -> dict[str, Any]:
    """What every installation here is told: pods of the test's cluster reach no package index and no registry."""
    env = {"UV_OFFLINE": "1", "UV_FIND_LINKS": "/var/lib/ekiben/given/wheels", "EKIBEN_DEPLOYER_DRAIN_S": "2"}
    return {
        "image": image,
        "images": {"nodePort": installing.free_node_port(cluster), "bases": "oci:/var/lib/ekiben/given/base"},
        "env": env,
    }


def fill(volume: Path) -> None:
    """What a builder there needs."""
    shutil.copytree(base_image().removeprefix("oci:"), volume / "given" / "base")
    shutil.copytree(installing.wheels(), volume / "given" / "wheels")


def address_of(cluster: Cluster, namespace: str) -> str:
    return "http://" + str(cluster.get("service", "ekiben", "-n", namespace)["spec"]["clusterIP"])


def test_from_an_empty_namespace_to_a_served_bento_and_uninstalling_leaves_all_of_it(
    cluster: Cluster, helm: Helm, image: Mapping[str, str], bentos: Path, tmp_path: Path
) -> None:
    with new_namespace(cluster, "install") as namespace, installing.volume(cluster, namespace, "data-ekiben-0") as data:
        fill(data)
        given = {**values_of(cluster, image), "persistence": {"size": "1Gi"}, "resources": SMALL}
        values = installing.written(tmp_path / "values.yaml", given)
        install = ("install", "ekiben", str(CHART), "-n", namespace, "-f", str(values), "--wait", "--timeout", "3m")
        read_token = ("exec", "-n", namespace, "ekiben-0", "--", "cat", "/var/lib/ekiben/admin-token")
        host = {**JSON, "host": "chain-default.localhost"}

        def describes() -> bool:
            answer = http("POST", f"{address_of(cluster, namespace)}/describe", b'{"text": "two words"}', host)
            return answer.status == 200 and answer.json() == {"words": 2, "letters": 9}

        with installing.told(cluster, namespace):
            helm(*install)
            token = cluster.kubectl(*read_token).strip()
            bentoml = BentoMl(client("1.4"), tmp_path / "client")
            bentoml("cloud", "login", "--endpoint", address_of(cluster, namespace), "--api-token", token)
            bentoml(
                "deploy", ".", "-n", "chain", cwd=shutil.copytree(bentos / "chain", tmp_path / "chain"), timeout_s=500
            )
            assert describes()
            selector = ("pods", "-n", namespace, "-l", "app.kubernetes.io/name=chain")
            pods = {pod["metadata"]["uid"] for pod in cluster.get(*selector)["items"]}
            helm("uninstall", "ekiben", "-n", namespace, "--wait", "--timeout", "2m")
            assert cluster.get("pvc", "data-ekiben-0", "-n", namespace)["status"]["phase"] == "Bound"
            helm(*install)
            assert cluster.kubectl(*read_token).strip() == token
            wait_for("the answer of what was deployed before", describes, 60)
            assert {pod["metadata"]["uid"] for pod in cluster.get(*selector)["items"]} == pods


def test_an_upgrade_to_another_image_and_a_rollback_of_services_apart_fail_no_prediction(
    cluster: Cluster,
    oci_registry: OciRegistry,
    helm: Helm,
    image: Mapping[str, str],
    bentos: Path,
    tmp_path: Path,
    postgres: PostgresServer,
    s3: S3Server,
) -> None:
    postgres.create(database := f"install_{os.urandom(4).hex()}")
    with (
        new_namespace(cluster, "apart") as namespace,
        installing.volume(cluster, namespace, "data-ekiben-builder-0") as data,
        installing.way(cluster, f"{postgres.folder}/.s.PGSQL.{postgres.port}") as database_at,
        installing.way(cluster, s3.endpoint.removeprefix("http://")) as s3_at,
    ):
        fill(data)
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        literals = [f"--from-literal={name}={value}" for name, value in keys.items()]
        cluster.kubectl("create", "secret", "generic", "s3", "-n", namespace, *literals)
        given = {
            **values_of(cluster, image),
            "mode": "distributed",
            "database": {"url": f"postgresql://postgres@{database_at}/{database}"},
            "blobs": {
                "url": s3.url(s3.new_bucket(), endpoint=f"http://{s3_at}"),
                "direct": False,
                "credentialsSecret": "s3",
            },
            **{name: {"resources": SMALL, "replicas": 2} for name in ("gateway", "registry", "deployer")},
            "recorder": {"resources": SMALL, "replicas": 1},
            "builder": {"resources": SMALL, "persistence": {"size": "1Gi"}},
        }
        values = installing.written(tmp_path / "values.yaml", given)
        common = ("ekiben", str(CHART), "-n", namespace, "-f", str(values), "--wait", "--timeout", "5m")
        with installing.told(cluster, namespace):
            helm("install", *common)
            address = address_of(cluster, namespace)
            secret = cluster.get("secret", "ekiben", "-n", namespace)["data"]
            token = base64.b64decode(secret["admin-token"]).decode()
            bentoml = BentoMl(client("1.4"), tmp_path / "client")
            bentoml("cloud", "login", "--endpoint", address, "--api-token", token)
            project = shutil.copytree(bentos / "versions", tmp_path / "versions")
            bentoml("deploy", ".", "-n", "versions", cwd=project, timeout_s=500)
            with installing.Load(f"{address}/version", {**JSON, "host": "versions-default.localhost"}) as load:
                helm("upgrade", *common, "--set", f"image.digest={(digest := another(oci_registry, image))}")
                ours = ("pods", "-n", namespace, "-l", "app.kubernetes.io/instance=ekiben")
                going = [each for each in cluster.get(*ours)["items"] if not each["metadata"].get("deletionTimestamp")]
                assert len(going) == 8 and all(digest in json.dumps(each["spec"]) for each in going)
                helm("rollback", "ekiben", "1", "-n", namespace, "--wait", "--timeout", "5m")
                over_a_migration(cluster, helm, namespace, postgres, database, bentoml)
                over_a_lost_deployer(cluster, namespace, address, token)
            assert not load.failed and load.answered > 100
            assert cluster.get("secret", "ekiben", "-n", namespace)["data"] == secret
            listed = json.loads(bentoml("deployment", "list", "-o", "json").stdout)
            assert [each["name"] for each in listed] == ["versions"]


def over_a_migration(
    cluster: Cluster, helm: Helm, namespace: str, postgres: PostgresServer, database: str, bentoml: BentoMl
) -> None:
    """Go back to a release that is older than a table: it says so and does not start, and those that run go on."""
    table = "ekiben_registry.alembic_version_registry"
    revision = postgres.psql(f"SELECT version_num FROM {table}", database)
    postgres.psql(f"UPDATE {table} SET version_num = 'of-later'", database)
    try:
        helm("rollback", "ekiben", "2", "-n", namespace)
        registries = ("pods", "-n", namespace, "-l", "app.kubernetes.io/component=registry")

        def says() -> bool:
            return "it is at revision of-later" in json.dumps(
                [each["status"] for each in cluster.get(*registries)["items"]]
            )

        wait_for("what keeps it from starting, as its pod's last words", says, 120)
        # Deployers are replaced too, and none has the cluster for a moment.
        wait_for("the API", lambda: "versions" in bentoml("deployment", "list", "-o", "json", check=False).stdout, 120)
    finally:
        postgres.psql(f"UPDATE {table} SET version_num = '{revision}'", database)
    cluster.kubectl("rollout", "status", "deployment/ekiben-registry", "-n", namespace, "--timeout=110s")


def over_a_lost_deployer(cluster: Cluster, namespace: str, address: str, token: str) -> None:
    """Delete the pod that has the cluster: the other one, which was as ready, is found by the gateways and their Envoys."""
    deployers = ("pods", "-n", namespace, "-l", "app.kubernetes.io/component=deployer")
    cluster.kubectl("rollout", "status", "deployment/ekiben-deployer", "-n", namespace, "--timeout=110s")

    def having() -> list[str]:
        asked = {
            each["metadata"]["name"]: http("GET", f"http://{each['status']['podIP']}:9090/readyz").status
            for each in cluster.get(*deployers)["items"]
            if not each["metadata"].get("deletionTimestamp") and each["status"].get("podIP")
        }
        return [name for name, status in asked.items() if status == 200]

    async def replicas() -> int:
        async with open_channel(address, token=token) as channel:
            request = deployer_pb2.ListReplicasRequest(parent="deployments/versions")
            return len((await deployer_pb2_grpc.DeploymentsStub(channel).ListReplicas(request)).replicas)

    def answered() -> bool:
        """By what only that one knows, over gRPC, which Envoy passes on; and over HTTP, which the gateway does."""
        try:
            asyncio.run(replicas())
        except Unavailable:
            return False
        bearer = {"authorization": f"Bearer {token}"}
        return http("GET", f"{address}/v1/deployments/versions/replicas", headers=bearer).status == 200

    wait_for("the API", answered, 120)
    (owner,) = having()
    cluster.kubectl("delete", "pod", owner, "-n", namespace, "--grace-period=0", "--force")
    wait_for("another one to have the cluster", lambda: set(having()) - {owner}, 120)
    wait_for("the API", answered, 120)
    cluster.kubectl("rollout", "status", "deployment/ekiben-deployer", "-n", namespace, "--timeout=110s")


def test_the_cluster_takes_the_kustomize_base_and_the_example_for_production(cluster: Cluster, helm: Helm) -> None:
    """Kustomize by kubectl, the example by helm; all of it is looked at by the API server, and none kept."""
    with new_namespace(cluster, "dry") as namespace:
        base = cluster.kubectl("kustomize", str(ROOT / "deploy" / "kustomize" / "base"))
        example = ("-f", str(EXAMPLES / "production.yaml"), "--set", "serviceMonitor.enabled=false")
        rendered = helm("template", "ekiben", str(CHART), "-n", namespace, *example).stdout
        for made in (base.replace("namespace: ekiben\n", f"namespace: {namespace}\n"), rendered):
            said = cluster.kubectl("apply", "--dry-run=server", "-n", namespace, "-f", "-", input=made)
            assert "created (server dry run)" in said and "role.rbac.authorization.k8s.io/ekiben" in said
