"""The deployer by its API: real bentos, real processes."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import exposure_pb2
from ekiben.deployer.v1.pods_pb2 import Mount, PodSettings
from ekiben.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from ekiben.identity.v1 import identity_pb2
from ekiben.identity.v1.identity_pb2_grpc import SecretsStub
from services.kernel import processes
from tests.fixtures_deployer import (
    SOURCES,
    Built,
    Suite,
    built,
    deployer_folders,
    registry,
    suite,
)

__all__ = ["built", "deployer_folders", "registry", "suite"]

pytestmark = pytest.mark.timeout(240)


def condition(deployment: pb.Deployment, type: str) -> pb.Condition:
    return next(one for one in deployment.conditions if one.type == type)


async def test_a_filter_has_a_longest_length(suite: Suite) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await suite.deployments.ListDeployments(pb.ListDeploymentsRequest(filter="a " * 3000))
    assert caught.value.reason == "FILTER_INVALID"


async def test_a_bento_runs_with_its_environment_and_nothing_of_the_platform_s(
    suite: Suite, built: Callable[..., Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_LEAK", "secret of the platform")
    bento = await suite.push(built("plain"))
    vault = SecretsStub(suite.registry.channel)
    for secret in (
        identity_pb2.Secret(
            name="secrets/keys",
            kind=identity_pb2.Secret.ENV,
            items=[
                identity_pb2.Secret.Item(key="API_KEY", value="s3cret"),
                identity_pb2.Secret.Item(key="BOTH", value="of the secret"),
            ],
        ),
        identity_pb2.Secret(
            name="secrets/files",
            kind=identity_pb2.Secret.MOUNT_FILE,
            path="$BENTO_PATH/keys",
            items=[identity_pb2.Secret.Item(key="a.pem", value="PEM")],
        ),
    ):
        await vault.CreateSecret(identity_pb2.CreateSecretRequest(secret=secret))
    service = pb.ServiceTemplate(envs=[pb.EnvVar(name="TIER", value="service")], instance_type="cpu.1")
    service.config_overrides.update({"traffic": {"timeout": 33}})
    # What a client sends for pods is kept for it, and said not to be acted on.
    service.extras.update({"bento_function_overrides": {"annotations": {"team": "a"}}})
    service.pod.termination_grace.seconds = 7
    template = pb.Template(
        envs=[pb.EnvVar(name="TIER", value="template"), pb.EnvVar(name="BOTH", value="of the template")],
        secrets=["secrets/keys", "secrets/files"],
        services={"Plain": service},
    )
    created = await suite.create("first", bento, template=template, labels={"a": "b"})
    assert created.state == pb.Deployment.DEPLOYING
    assert created.reconciling
    deployment = await suite.running("first")
    assert deployment.serving_revision == deployment.latest_revision == "deployments/first/revisions/1"
    assert deployment.replica_counts["Plain"] == pb.ReplicaCounts(desired=1, total=1, ready=1, updated_ready=1)
    assert condition(deployment, "Available").status == pb.Condition.TRUE
    assert "extras of the client speak of pods" in condition(deployment, "Available").message
    assert deployment.urls[0].startswith("http://127.0.0.1:215")
    status, text = await suite.call("first", "/env", {})
    assert status == 200
    env = json.loads(text)
    assert (env["API_KEY"], env["BOTH"], env["TIER"]) == ("s3cret", "of the template", "service")
    assert "EKIBEN_LEAK" not in env
    assert not any(value.startswith(("eks_", "ekb_")) for value in env.values())
    assert json.loads(env["BENTOML_CONFIG_OVERRIDES"])["services"]["Plain"]["traffic"] == {"timeout": 33}
    key = Path(env["BENTO_PATH"]) / "keys/a.pem"
    assert key.read_text() == "PEM"
    assert key.stat().st_mode & 0o777 == 0o600
    (route,) = suite.table.routes
    assert list(route.hosts) == ["first-default.localhost"]
    (replica,) = await suite.replicas("first")
    assert replica.state == pb.Replica.READY
    lines = [line async for line in suite.deployments.ReadLogs(pb.ReadLogsRequest(name="deployments/first"))]
    assert any("Service Plain initialized" in line.text for line in lines)
    assert all(line.time.seconds > 1_700_000_000 and line.replica == replica.replica for line in lines)

    async def printed(**asked: Any) -> list[pb.LogLine]:
        request = pb.ReadLogsRequest(name="deployments/first", **asked)
        return [line async for line in suite.deployments.ReadLogs(request)]

    assert await printed(tail_lines=1) == lines[-1:] and await printed(tail_lines=0) == []
    assert await printed(since_time=lines[-1].time) == [line for line in lines if line.time == lines[-1].time]
    with pytest.raises(InvalidArgument, match="since_time"):
        await printed(since_time={"seconds": 10**12})


async def test_services_call_one_another_and_the_inner_one_cannot_be_reached(
    suite: Suite, built: Callable[..., Built]
) -> None:
    await suite.create("chain", await suite.push(built("front")))
    deployment = await suite.running("chain")
    assert set(deployment.replica_counts) == {"Front", "Scorer"}
    # The entry has its default from the manifest, the service behind it from its code.
    assert await suite.call("chain", "/greet", {"text": "four"}) == (200, "hello 4 plum")
    (route,) = suite.table.routes
    assert [target.service for target in route.targets] == ["Front"]
    (internal,) = route.internal_routes
    assert internal.service == "Scorer"
    assert all(endpoint.address.startswith("unix:") for endpoint in internal.endpoints)
    assert suite.run_dir.stat().st_mode & 0o777 == 0o700


async def test_a_bento_with_a_model_finds_it(suite: Suite, built: Callable[..., Built]) -> None:
    await suite.create("model", await suite.push(built("modelled")))
    await suite.running("model")
    assert await suite.call("model", "/read", {}) == (200, "forty-two")
    (route,) = suite.table.routes
    assert len(route.targets[0].models) == 1


async def test_a_bento_of_bentoml_1_1_runs_as_a_whole(suite: Suite, built: Callable[..., Built]) -> None:
    await suite.create("old", await suite.push(built("old")))
    await suite.running("old")
    assert await suite.call("old", "/shout", "abc") == (200, "ABC")


async def test_a_crashing_replica_is_told_in_words_and_an_update_repairs_it(
    suite: Suite, built: Callable[..., Built]
) -> None:
    bento = await suite.push(built("needy"))
    await suite.create("needy", bento)
    failed = await suite.until("needy", lambda d: d.state == pb.Deployment.FAILED)
    assert condition(failed, "Available").reason == "ENV_MISSING"
    assert "LICENSE" in condition(failed, "Available").message
    sent = pb.Deployment(name="deployments/needy", template=pb.Template(envs=[pb.EnvVar(name="LICENSE", value="1")]))
    mask = FieldMask(paths=["template.envs"])
    await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=sent, update_mask=mask))
    failed = await suite.until(
        "needy",
        lambda d: d.state == pb.Deployment.FAILED and condition(d, "Available").reason == "REPLICA_CRASHED",
        90,
    )
    assert "the license server said no" in condition(failed, "Available").message
    status, detail = await suite.call("needy", "/f", {})
    assert status == 503
    # A caller of the deployment reads what is wrong, but not what the replica printed: its log is not theirs to see.
    assert "It exited with 1" in detail and "the license server said no" not in detail
    plain = await suite.push(built("plain"))
    sent = pb.Deployment(name="deployments/needy", template=pb.Template(bento=plain))
    await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=sent))
    assert (await suite.running("needy")).latest_revision.endswith("/3")


async def test_an_update_under_load_fails_no_request_and_a_rollback_goes_back(
    suite: Suite, built: Callable[..., Built]
) -> None:
    first = await suite.push(built("plain"))
    second = await suite.push(built("plain", SOURCES["plain"].replace('"done"', '"done again"')))
    await suite.create("load", first)
    await suite.running("load")
    answers: list[tuple[int, str]] = []
    done = asyncio.Event()

    async def load() -> None:
        while not done.is_set():
            answers.append(await suite.call("load", "/slow", {"seconds": 0.05}))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(load())
        sent = pb.Deployment(name="deployments/load", template=pb.Template(bento=second))
        await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=sent))
        await suite.running("load", 2)
        back = await suite.deployments.RollbackDeployment(pb.RollbackDeploymentRequest(name="deployments/load"))
        await suite.running("load", back.generation)
        done.set()
    assert {status for status, _ in answers} == {200}
    assert {text for _, text in answers} == {"done", "done again"}
    revision = await suite.deployments.GetRevision(pb.GetRevisionRequest(name="deployments/load/revisions/3"))
    assert revision.rolled_back_to == "deployments/load/revisions/1"
    assert revision.template.bento == first
    assert revision.serving
    listed = await suite.deployments.ListRevisions(pb.ListRevisionsRequest(parent="deployments/load"))
    assert [one.name[-1] for one in listed.revisions] == ["3", "2", "1"]


async def test_scaling_makes_no_revision_and_terminating_drains(suite: Suite, built: Callable[..., Built]) -> None:
    await suite.create("scaled", await suite.push(built("plain")))
    await suite.running("scaled")
    scaled = await suite.deployments.ScaleDeployment(pb.ScaleDeploymentRequest(name="deployments/scaled", replicas=2))
    assert (await suite.running("scaled", scaled.generation)).replica_counts["Plain"].ready == 2
    slow = asyncio.create_task(suite.call("scaled", "/slow", {"seconds": 2}))
    await asyncio.sleep(0.3)
    await suite.deployments.TerminateDeployment(pb.TerminateDeploymentRequest(name="deployments/scaled"))
    ended = await suite.until("scaled", lambda d: d.state == pb.Deployment.TERMINATED)
    assert ended.terminated
    assert await slow == (200, "done")
    assert (await suite.call("scaled", "/env", {}))[0] == 503
    sent = pb.Deployment(name="deployments/scaled", labels={"x": "y"})
    started = await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=sent))
    assert started.latest_revision.endswith("/1")
    again = await suite.running("scaled", started.generation)
    assert again.replica_counts["Plain"].ready == 2
    deleted = await suite.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name="deployments/scaled"))
    assert deleted.name == "deployments/scaled"

    async def gone() -> bool:
        try:
            await suite.get("scaled")
        except NotFound:
            return True
        return False

    async with asyncio.timeout(30):
        while not await gone():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert await processes.end_strays(processes.mark_of("deployer", suite.data_dir)) == 0


async def test_what_is_wrong_is_refused_before_anything_is_written(suite: Suite, built: Callable[..., Built]) -> None:
    bento = await suite.push(built("plain"))
    with pytest.raises(InvalidArgument) as caught:
        await suite.create(
            "bad",
            bento,
            template=pb.Template(
                envs=[pb.EnvVar(name="9X"), pb.EnvVar(name="BENTOML_HOME")],
                services={"Plain": pb.ServiceTemplate(deployment_strategy="Yolo")},
            ),
            scaling={"Plain": pb.Scaling(min_replicas=3, max_replicas=2)},
        )
    assert len(caught.value.violations) == 4
    for fields, error, reason in (
        ({"services": {"Plain": pb.ServiceTemplate(instance_type="huge")}}, InvalidArgument, "INSTANCE_TYPE_UNKNOWN"),
        ({"services": {"Other": pb.ServiceTemplate()}}, InvalidArgument, "SERVICE_UNKNOWN"),
        (
            {"services": {"Plain": pb.ServiceTemplate(pod=PodSettings(node_selector={"disk": "ssd"}))}},
            InvalidArgument,
            "POD_SETTINGS_UNSUPPORTED",
        ),
        (
            {"services": {"Plain": pb.ServiceTemplate(pod=PodSettings(mounts=[Mount(path="data")]))}},
            InvalidArgument,
            "FIELDS_INVALID",
        ),
        ({"secrets": ["secrets/none"]}, NotFound, "SECRET_NOT_FOUND"),
    ):
        with pytest.raises(error) as refused:
            await suite.create("bad", bento, template=pb.Template(**fields))
        assert refused.value.reason == reason
    with pytest.raises(FailedPrecondition) as unsupported:
        await suite.create("bad", bento, exposure=exposure_pb2.Exposure(kind=exposure_pb2.Exposure.INGRESS))
    assert unsupported.value.reason == "EXPOSURE_UNSUPPORTED"
    with pytest.raises(NotFound):
        await suite.create("bad", "bentoRepositories/none/bentos/latest")
    with pytest.raises(InvalidArgument):
        await suite.create("Bad_Name", bento)
    with pytest.raises(InvalidArgument):
        await suite.create("a" * 64, bento)
    with pytest.raises(NotFound):
        await suite.get("bad")


async def test_etags_names_and_what_does_not_change(suite: Suite, built: Callable[..., Built]) -> None:
    bento = await suite.push(built("plain"))
    suite.builds.failing[bento] = "no such package: nonesuch"
    created = await suite.create("named", bento.rpartition("/")[0] + "/latest")
    assert created.template.bento == bento
    with pytest.raises(AlreadyExists):
        await suite.create("named", bento)
    failed = await suite.until("named", lambda d: d.state == pb.Deployment.FAILED)
    assert "nonesuch" in condition(failed, "Built").message
    same = await suite.deployments.UpdateDeployment(
        pb.UpdateDeploymentRequest(deployment=pb.Deployment(name=created.name, template=pb.Template(bento=bento)))
    )
    assert (same.generation, same.latest_revision) == (1, created.latest_revision)
    with pytest.raises(Aborted):
        await suite.deployments.UpdateDeployment(
            pb.UpdateDeploymentRequest(deployment=pb.Deployment(name=created.name, labels={"a": "b"}, etag='"stale"'))
        )
    with pytest.raises(FailedPrecondition):
        await suite.deployments.RollbackDeployment(pb.RollbackDeploymentRequest(name=created.name))
    made_up = await suite.deployments.CreateDeployment(
        pb.CreateDeploymentRequest(deployment=pb.Deployment(template=pb.Template(bento=bento)))
    )
    assert made_up.name.startswith("deployments/plain-")
    assert made_up.urls != created.urls
    listed = await suite.deployments.ListDeployments(pb.ListDeploymentsRequest(page_size=1))
    assert (listed.deployments[0].name, listed.total_size) == (made_up.name, 2)
    rest = await suite.deployments.ListDeployments(
        pb.ListDeploymentsRequest(page_size=1, page_token=listed.next_page_token)
    )
    assert [one.name for one in rest.deployments] == [created.name]
    assert not rest.next_page_token
