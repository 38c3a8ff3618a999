"""What the chart renders, for every values that the docs name and every Kubernetes that it promises."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.deployer.domain import reserved
from services.deployer.runtimes.kubernetes import api
from services.deployer.runtimes.kubernetes.rights import RIGHTS
from tests.helm import CHART, EXAMPLES, MISSING, Helm, helm_program
from tests.platform import ROOT

VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36")
_NAMED = re.findall(r"```yaml values\n(.*?)```", (ROOT / "docs" / "install-kubernetes.md").read_text(), re.DOTALL)
VALUES = {"defaults": "", **{f"docs-{number}": text for number, text in enumerate(_NAMED, 1)}} | {
    file.stem: file.read_text() for file in sorted(EXAMPLES.glob("*.yaml"))
}


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm without a cluster."""
    program = helm_program(build=False)
    if program is None:
        pytest.skip(MISSING)
    return Helm(program, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="module")
def rendered(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Renders values, each once."""
    folder = tmp_path_factory.mktemp("values")

    @functools.cache
    def render(name: str) -> list[dict[str, Any]]:
        file = folder / f"{name}.yaml"
        file.write_text(VALUES[name])
        done = helm("template", "ekiben", str(CHART), "-n", "ekiben", "-f", str(file), "--kube-version", "1.30.0")
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    return render


@functools.cache
def fault_of(made: str, version: str) -> str:
    """What a version's schema says against an object; empty where it fits."""
    try:
        kubernetes_validate.validate(json.loads(made), version, strict=True)
    except kubernetes_validate.ValidationError as exc:
        return f"{version}: {exc} in {made}"
    return ""


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and pod of each workload."""
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", VALUES)
def test_objects_fit_the_schema_of_every_version(rendered: Any, name: str) -> None:
    faults = []
    for each in rendered(name):
        if each["kind"] == "ServiceMonitor":  # of Prometheus' operator, whose schema is not Kubernetes'
            continue
        faults += [fault for version in VERSIONS if (fault := fault_of(json.dumps(each), version))]
    assert not faults


@pytest.mark.parametrize("name", VALUES)
def test_helm_has_nothing_to_complain_about(helm: Helm, tmp_path: Path, name: str) -> None:
    (tmp_path / "values.yaml").write_text(VALUES[name])
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), "-f", str(tmp_path / "values.yaml")).stdout


@pytest.mark.parametrize("name", VALUES)
def test_pods_are_restricted_and_nothing_reaches_beyond_the_namespace(rendered: Any, name: str) -> None:
    objects = rendered(name)
    named = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(named)) == len(named)
    assert not [each["kind"] for each in objects if each["kind"].startswith(("Cluster", "CustomResource"))]
    for workload, pod in pods(objects):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}, workload
        assert pod["enableServiceLinks"] is False, workload
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"], workload
            assert own["capabilities"] == {"drop": ["ALL"]}, workload
            assert container["resources"]["limits"]["memory"], workload
            variables = [each["name"] for each in container["env"]]
            assert len(set(variables)) == len(variables), workload
        deployer = workload in ("ekiben-deployer",) or len(list(pods(objects))) == 1
        assert pod["automountServiceAccountToken"] is deployer, workload


@pytest.mark.parametrize(
    ("values", "without"),
    [
        ((), {"exposure by HTTPRoute"}),
        (("--set", "replicas.httpRoutes=true"), set()),
        (("--set", "replicas.terminals=false"), {"exposure by HTTPRoute", "terminals", "debug containers"}),
    ],
)
def test_the_role_allows_what_the_deployer_says_it_needs_and_nothing_more(
    helm: Helm, values: tuple[str, ...], without: set[str]
) -> None:
    made = helm("template", "ekiben", str(CHART), *values).stdout
    (role,) = [each for each in yaml.safe_load_all(made) if each and each["kind"] == "Role"]
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {
        (right.group, right.resource, verb) for right in RIGHTS if right.optional not in without for verb in right.verbs
    }
    known = {path.rpartition("/")[2] for path in api._PATHS.values()} - ({"httproutes"} if without else set())
    assert known <= {resource for _, resource, _ in allowed}


@pytest.mark.parametrize("mode", ["defaults", "production"])
def test_without_the_right_to_terminals_the_deployer_opens_none(helm: Helm, tmp_path: Path, mode: str) -> None:
    (tmp_path / "values.yaml").write_text(VALUES[mode])
    for terminals in ("true", "false"):
        given = ("-f", str(tmp_path / "values.yaml"), "--set", f"replicas.terminals={terminals}")
        made = [each for each in yaml.safe_load_all(helm("template", "ekiben", str(CHART), *given).stdout) if each]
        said = [
            each["value"]
            for _, pod in pods(made)
            for each in pod["containers"][0]["env"]
            if each["name"] == "EKIBEN_DEPLOYER_TERMINALS"
        ]
        assert said == ([] if terminals == "true" else ["off"])


def test_each_service_is_rolled_and_of_two_pods_one_may_be_away(helm: Helm, tmp_path: Path) -> None:
    """So that `helm --wait` ends, all pods of a service must be able to be ready: of deployers one stands by."""
    (tmp_path / "values.yaml").write_text(VALUES["production"])
    given = ("-f", str(tmp_path / "values.yaml"), "--set", "deployer.replicas=2")
    made = [each for each in yaml.safe_load_all(helm("template", "ekiben", str(CHART), *given).stdout) if each]
    rolled = {each["metadata"]["name"]: each["spec"]["strategy"] for each in made if each["kind"] == "Deployment"}
    assert len(rolled) == 4
    assert {strategy["rollingUpdate"]["maxUnavailable"] for strategy in rolled.values()} == {0}
    budgets = {each["metadata"]["name"]: each["spec"] for each in made if each["kind"] == "PodDisruptionBudget"}
    assert budgets.keys() == rolled.keys()
    ((container,),) = (pod["containers"] for name, pod in pods(made) if name == "ekiben-deployer")
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz?standbyok=true"


def test_names_can_be_those_of_services_and_are_no_other_releases(helm: Helm) -> None:
    long = "a-release-of-a-name-that-is-nearly-as-long-as-can-be"
    seen: dict[str, str] = {}
    for release in ("ekiben", "x", "my.release", "my-release", "1st", "123", f"{long}1", f"{long}2"):
        objects = [each for each in yaml.safe_load_all(helm("template", release, str(CHART)).stdout) if each]
        for each in objects:
            name = each["metadata"]["name"]
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name), name
            assert seen.setdefault(name, release) == release
            assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    assert "ekiben" in seen and "x-ekiben" in seen


def selectors(value: Any) -> Iterator[dict[str, str]]:
    """All by which pods are chosen."""
    if isinstance(value, list):
        for each in value:
            yield from selectors(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in ("selector", "podSelector", "labelSelector") and isinstance(each, dict):
                yield each.get("matchLabels", each)
            else:
                yield from selectors(each)


@pytest.mark.parametrize("name", VALUES)
def test_no_pod_of_a_deployment_can_be_taken_for_one_of_the_platform(rendered: Any, name: str) -> None:
    """Replicas may run beside the platform, and who deploys says most of their labels."""
    objects = rendered(name)
    chosen = [(each["kind"], selector) for each in objects for selector in selectors(each.get("spec", {}))]
    assert {kind for kind, _ in chosen} >= {"Service", "NetworkPolicy"}
    for kind, selector in chosen:
        assert selector["ekiben.dev/platform"] == "ekiben", (kind, selector)
        assert reserved("labels", selector) == sorted(selector), (kind, selector)
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            labels = each["spec"]["template"]["metadata"]["labels"]
            assert each["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_a_release_that_the_chart_named_otherwise_before_keeps_its_name(helm: Helm) -> None:
    before = "a-release-of-a-name-that-is-nearly-as-lo"  # Cut off at 40 characters.
    made = helm("template", f"{before}-and-more", str(CHART), "--set", f"fullnameOverride={before}").stdout
    assert [name for name, _ in pods([each for each in yaml.safe_load_all(made) if each])] == [before]


@pytest.mark.parametrize(
    ("url", "hosts"),
    [("https://ekiben.example.com:8443", "ekiben.example.com"), ("https://elsewhere.org", None)],
)
def test_the_api_answers_at_its_own_url_below_the_domain_of_deployments(helm: Helm, url: str, hosts: str) -> None:
    made = helm("template", "ekiben", str(CHART), "--set", f"publicUrl={url},domain=example.com").stdout
    ((_, pod),) = pods([each for each in yaml.safe_load_all(made) if each])
    variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert variables.get("EKIBEN_GATEWAY_API_HOSTS") == hosts


@pytest.mark.parametrize("name", ["defaults", "production"])
def test_a_variable_of_the_user_stands_in_the_place_of_the_charts(helm: Helm, tmp_path: Path, name: str) -> None:
    (tmp_path / "values.yaml").write_text(VALUES[name])
    given = ("--set-string", "env.HOME=/var/tmp", "--set-string", "env.EKIBEN_SERVER_LOG_LEVEL=DEBUG")
    made = helm("template", "ekiben", str(CHART), "-f", str(tmp_path / "values.yaml"), *given).stdout
    for workload, pod in pods([each for each in yaml.safe_load_all(made) if each]):
        variables = [(each["name"], each["value"]) for each in pod["containers"][0]["env"]]
        assert ("HOME", "/var/tmp") in variables and ("EKIBEN_SERVER_LOG_LEVEL", "DEBUG") in variables, workload
        assert len(dict(variables)) == len(variables), workload


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((), "port-forward service/ekiben 7400:80"),
        (("service.port=81", "publicUrl=http://localhost"), "port-forward service/ekiben 80:81"),
        (("publicUrl=https://x.example.com",), "https://x.example.com, once something of yours leads from there to"),
        (("publicUrl=https://x.example.com", "ingress.enabled=true", "ingress.hosts={x.example.com}"), ""),
    ],
)
def test_the_notes_log_in_where_they_say_that_it_is_reached(helm: Helm, values: tuple[str, ...], said: str) -> None:
    given = [word for value in values for word in ("--set", value)]
    notes = helm.json("install", "ekiben", str(CHART), "--dry-run=client", *given)["info"]["notes"]
    reached = notes.split("1. Reach it:\n")[1].split("\n\n")[0]
    (endpoint,) = re.findall("--endpoint ([^ ]+)", notes)
    assert said in reached
    assert ("port-forward" in reached) != (endpoint in reached)


@pytest.mark.parametrize("name", ["defaults", "production"])
def test_whoever_has_the_login_of_registries_is_told_where_it_is(helm: Helm, tmp_path: Path, name: str) -> None:
    (tmp_path / "values.yaml").write_text(VALUES[name])
    given = ("-f", str(tmp_path / "values.yaml"), "--set", "images.pushSecret=push")
    made = helm("template", "ekiben", str(CHART), *given).stdout
    having = set()
    for workload, pod in pods([each for each in yaml.safe_load_all(made) if each]):
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        variables = {each["name"]: each["value"] for each in container["env"]}
        told = variables.get("REGISTRY_AUTH_FILE")
        assert told == (f"{mounted['login']}/.dockerconfigjson" if "login" in mounted else None), workload
        having |= {workload} if told else set()
    assert having == ({"ekiben"} if name == "defaults" else {"ekiben-builder", "ekiben-deployer"})


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ("gatway: {replicas: 3}", "gatway"),
        ("mode: distributed", "/database/url"),
        ("image: {digest: latest}", "/image/digest"),
        ("images: {nodePort: 0}", "images.registry, images.pullHost or images.nodePort"),
        (f"{_NAMED[-1]}\nbuilder: {{replicas: 2}}", "builder.replicas above 1 needs images.registry"),
        ("ingress: {enabled: true}", "/ingress/hosts"),
        ("nameOverride: Bad_Name", "/nameOverride"),
        ("fullnameOverride: has.dots", "/fullnameOverride"),
        ("replicas: {namespace: Bad_One}", "/replicas/namespace"),
        ("service: {port: 99999}", "/service/port"),
        ("images: {pullHost: 'http://x'}", "/images/pullHost"),
        ("images: {pullHost: ':30740'}", "/images/pullHost"),
        ("podLabels: {app.kubernetes.io/name: other}", "app.kubernetes.io/name"),
        ("podLabels: {ekiben.dev/platform: other}", "ekiben.dev/platform"),
        (f"{_NAMED[-1]}\nblobs: {{url: 'file:///blobs'}}", "/blobs/url"),
        (
            f"{_NAMED[-1]}\ngateway: {{autoscaling: {{enabled: true, minReplicas: 11}}}}",
            "gateway.autoscaling.minReplicas is above its maxReplicas",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_in_words(helm: Helm, tmp_path: Path, values: str, why: str) -> None:
    (tmp_path / "values.yaml").write_text(values)
    done = helm("template", "ekiben", str(CHART), "-f", str(tmp_path / "values.yaml"), check=False)
    assert done.returncode != 0
    assert why in done.stderr
