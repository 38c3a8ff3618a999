"""A cluster that somebody adds to a platform on one machine: two namespaces, a role for each, and its own credentials."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.cluster import Cluster, Passage
from tests.cluster_platform import new_namespace
from tests.installing import Load
from tests.platform import BentoMl, Platform, http, running, wait_for

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def passage(cluster: Cluster) -> Iterator[Passage]:
    with cluster.passage() as found:
        yield found


@pytest.fixture(scope="module")
def here(passage: Passage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform whose own replicas are processes."""
    env = {"EKIBEN_BUILDER_BASES": base_image(), "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system"}
    with running(tmp_path_factory.mktemp("here") / "data", env=env) as up, passage.to(f"127.0.0.1:{up.port}"):
        yield up


@pytest.fixture(scope="module")
def namespaces(cluster: Cluster) -> Iterator[tuple[str, str]]:
    with new_namespace(cluster, "first") as first, new_namespace(cluster, "second") as second:
        yield first, second


@pytest.fixture(scope="module")
def receiver(cluster: Cluster, here: Platform) -> Iterator[str]:
    """Where pods reach the platform's recorder."""
    with cluster.serve_pods(f"127.0.0.1:{(here.data / 'otlp-port').read_text().strip()}") as address:
        yield f"http://{address}"


def kubeconfig(cluster: Cluster, namespace: str, **user: str) -> str:
    """A kubeconfig of the ServiceAccount `ekiben`, or of whoever is given."""
    whole = yaml.safe_load(cluster.kubeconfig.read_text())
    whole["users"][0]["user"] = user or {"token": token(cluster, namespace)}
    return str(yaml.safe_dump(whole))


def token(cluster: Cluster, namespace: str) -> str:
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/ekiben/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    made = cluster.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(request))
    return str(json.loads(made)["status"]["token"])


def test_a_cluster_comes_serves_in_two_namespaces_and_goes(
    cluster: Cluster,
    here: Platform,
    passage: Passage,
    receiver: str,
    namespaces: tuple[str, str],
    bentos: Path,
    tmp_path: Path,
) -> None:
    first, second = namespaces
    file = tmp_path / "kubeconfig"
    cluster.kubectl("create", "serviceaccount", "ekiben", "-n", first)
    file.write_text(kubeconfig(cluster, first))
    lacking = here.ekiben(
        *("clusters", "create", "far", "--kubeconfig", str(file), "--pull-host", passage.name),
        *("--namespace", first, "--namespace", second, "--otlp-http-endpoint", receiver),
    )
    assert f"do not allow: get, list, watch, create, patch, delete secrets in {second}" in lacking.stderr
    assert here.ekiben("clusters", "check", "far", check=False).returncode == 1
    cluster.kubectl("apply", "-f", "-", input=here.ekiben("clusters", "roles", "far").stdout)
    wait_for("the rights", lambda: here.ekiben("clusters", "check", "far").returncode == 0)

    admin = ("clusters", "create", "unmade", "--kubeconfig", str(cluster.kubeconfig), "--namespace", "is-not-there")
    assert "There is no namespace is-not-there in it: kubectl create namespace" in here.ekiben(*admin).stderr
    assert here.ekiben("clusters", "check", "unmade", check=False).returncode == 1
    here.ekiben("clusters", "delete", "unmade", "--yes")

    shown = here.ekiben_json("clusters", "get", "far")
    assert shown["namespaces"] == [first, second] and shown["server"].startswith("https://")
    assert "kubeconfig" not in shown and token_of(file) not in json.dumps(shown)
    assert token_of(file).encode() not in b"".join(path.read_bytes() for path in databases(here))

    bentoml = BentoMl(client("1.4"), tmp_path / "client").login(here)
    project = bentos / "versions"
    bentoml("deploy", str(project), "-n", "far-one", "--cluster", "far", timeout_s=500)
    bentoml("deploy", str(project), "-n", "near", timeout_s=400)
    here.ekiben(
        "deployments", "create", "versions", "--name", "far-two", "--cluster", "far", "--kubernetes-namespace", second
    )
    for name in ("far-one", "far-two", "near"):
        host = {"host": f"{name}-default.localhost"}
        assert http("POST", f"{here.url}/version", b"{}", JSON | host).body == b"1", name
    for namespace, name in ((first, "far-one"), (second, "far-two")):
        [pod] = cluster.get("pods", "-n", namespace)["items"]
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == name
    # Its pods tell the recorder of what they do.
    trace = "6" * 31 + "c"
    host = {"host": "far-one-default.localhost", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert http("POST", f"{here.url}/version", b"{}", JSON | host).status == 200
    wait_for("spans of the pod", lambda: "Versions" in here.ekiben("traces", "show", trace, "-o", "json").stdout, 60)
    listed = bentoml("deployment", "list", "--cluster", "far", "-o", "json").stdout
    assert "far-one" in listed and "near" not in listed
    assert "service loaded" in here.ekiben("deployments", "logs", "far-one").stdout.lower()

    for words in (("clusters", "delete", "far", "--yes"), ("clusters", "update", "far", "--namespace", first)):
        refused = here.ekiben(*words, check=False)
        assert refused.returncode and "far-two" in refused.stderr, refused.stderr
    # Other credentials: pods stay, and the next change is made with them.
    pods = [pod["metadata"]["uid"] for pod in cluster.get("pods", "-n", first)["items"]]
    # Such as the cluster does not take hurt nobody either.
    with Load(f"{here.url}/version", JSON | {"host": "far-one-default.localhost"}, callers=1) as load:
        for user in ({"token": "of-nobody"}, {}):
            file.write_text(kubeconfig(cluster, first, **user))
            here.ekiben("clusters", "update", "far", "--kubeconfig", str(file))
        here.ekiben("deployments", "scale", "far-one", "2")
    assert not load.failed and load.answered
    assert len(cluster.get("pods", "-n", first)["items"]) == 2
    assert pods[0] in {pod["metadata"]["uid"] for pod in cluster.get("pods", "-n", first)["items"]}
    # A platform that starts again finds what is there.
    here.kill()
    here.start()
    wait_for("the answer after the kill", lambda: answers(here, "far-one"), 60)
    for name in ("far-one", "far-two"):
        here.ekiben("deployments", "delete", name, "--yes")
    wait_for("nothing left", lambda: not cluster.get("pods,deployments", "-n", first)["items"], 120)
    here.ekiben("clusters", "delete", "far", "--yes")
    assert http("POST", f"{here.url}/version", b"{}", JSON | {"host": "near-default.localhost"}).body == b"1"


def test_a_cluster_that_is_away_hurts_no_other(here: Platform, tmp_path: Path, bentos: Path) -> None:
    file = tmp_path / "kubeconfig"
    nowhere = {"server": "https://127.0.0.1:9", "insecure-skip-tls-verify": True}
    file.write_text(
        yaml.safe_dump(
            {
                "current-context": "x",
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
                "clusters": [{"name": "x", "cluster": nowhere}],
                "users": [{"name": "x", "user": {"token": "t"}}],
            }
        )
    )
    made = here.ekiben("clusters", "create", "away", "--kubeconfig", str(file))
    assert "does not answer" in made.stderr
    bentoml = BentoMl(client("1.4"), tmp_path / "client").login(here)
    bentoml("deploy", str(bentos / "versions"), "-n", "beside", timeout_s=400)
    assert answers(here, "beside")
    here.ekiben("deployments", "create", "versions", "--name", "nowhere", "--cluster", "away", "--no-wait")

    def said() -> bool:
        found = here.ekiben_json("deployments", "get", "nowhere")
        return any("does not answer" in condition.get("message", "") for condition in found["conditions"])

    wait_for("words on the deployment", said, 120)
    here.ekiben("deployments", "delete", "nowhere", "--yes")
    wait_for("its end", lambda: here.ekiben("deployments", "get", "nowhere", check=False).returncode, 60)
    here.ekiben("clusters", "delete", "away", "--yes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--in-cluster", "--kubeconfig", "-"), "either"),
        (("--in-cluster", "--namespace", "Not_One"), "cannot be the name of a namespace"),
        (("--in-cluster", "--pull-host", "a/b"), "HOST[:PORT]"),
    ],
)
def test_bad_clusters_are_refused(here: Platform, words: tuple[str, ...], said: str) -> None:
    refused = here.ekiben("clusters", "create", "bad", *words, check=False)
    assert refused.returncode and said in refused.stderr, refused.stderr
    assert [each["name"] for each in here.ekiben_json("clusters", "list") if "bad" in each["name"]] == []


def test_the_default_cluster_is_what_the_settings_say(here: Platform) -> None:
    shown = here.ekiben_json("clusters", "get", "default")
    assert (shown["runtime"], shown["description"]) == ("process", "This machine.")
    for words in (("delete", "default", "--yes"), ("update", "default", "--description", "x"), ("check", "default")):
        refused = here.ekiben("clusters", *words, check=False)
        assert refused.returncode and "settings" in refused.stderr, refused.stderr
    unknown = here.ekiben("deployments", "create", "versions", "--name", "x", "--cluster", "none", check=False)
    assert unknown.returncode


def answers(platform: Platform, name: str) -> bool:
    host = {"host": f"{name}-default.localhost"}
    return http("POST", f"{platform.url}/version", b"{}", JSON | host).body == b"1"


def token_of(file: Path) -> str:
    return str(yaml.safe_load(file.read_text())["users"][0]["user"]["token"])


def databases(platform: Platform) -> list[Path]:
    return [path for path in platform.data.rglob("*.db*") if path.is_file()]
