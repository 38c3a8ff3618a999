"""What deployments use cannot be deleted in the registry, and stays known when they are gone."""

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.channel import open_channel
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import EkibenError, FailedPrecondition, NotFound, Unavailable
from ekiben.identity.v1 import identity_pb2
from ekiben.identity.v1.identity_pb2_grpc import SecretsStub
from ekiben.registry.v1 import lineage_pb2 as lpb
from ekiben.registry.v1 import lineage_pb2_grpc, registry_pb2, registry_pb2_grpc
from services.deployer import uses as loop
from services.deployer.uses import Uses
from tests.fixtures_builder import Registry, running_registry
from tests.fixtures_deployer import Built, Suite, running_deployer
from tests.fixtures_kernel import short_path, until  # noqa: F401


@pytest.fixture
async def suite(tmp_path: Path, short_path: Path) -> AsyncIterator[Suite]:  # noqa: F811
    async with running_registry(short_path) as registry:
        async with running_deployer(registry, tmp_path / "deployer", short_path / "run", gateway=False) as suite:
            yield suite


async def push(suite: Suite, folder: Path, version: str) -> str:
    """A bento with a model, the model's version being the bento's. Its environment cannot be built: nothing starts."""
    bento, model = folder / "bentos" / "svc" / version, folder / "models" / "iris" / version
    for path in (bento, model):
        path.mkdir(parents=True)
    (model / "model.yaml").write_text("name: iris\n")
    described = {"name": "svc", "service": "service:Svc", "models": [f"iris:{version}"], "services": []}
    (bento / "bento.yaml").write_text(yaml.safe_dump(described))
    name = await suite.push(Built(bento, (model,)))
    suite.builds.failing[name] = "not today"
    return name


async def reported(registry: Registry) -> bool:
    """Whether a deployment's claim was followed by its report; a mere claim lapses by itself, and nobody sweeps it."""
    token = (registry.folder / "service-token").read_text().strip()
    async with open_channel(f"unix:{registry.run_dir}/registry", token=token) as channel:
        request = lpb.ListUseOwnersRequest(prefix="deployments/")
        return bool((await lineage_pb2_grpc.LineageStub(channel).ListUseOwners(request)).owners)


def model_of(bento: str) -> str:
    return f"modelRepositories/iris/models/{bento.rpartition('/')[2]}"


async def delete(suite: Suite, name: str, **options: Any) -> None:
    channel = suite.registry.channel
    if name.startswith("bento"):
        await registry_pb2_grpc.BentosStub(channel).DeleteBento(registry_pb2.DeleteBentoRequest(name=name, **options))
    else:
        await registry_pb2_grpc.ModelsStub(channel).DeleteModel(registry_pb2.DeleteModelRequest(name=name, **options))


async def refusal(suite: Suite, name: str) -> str:
    with pytest.raises(FailedPrecondition) as caught:
        await delete(suite, name)
    return f"{caught.value.reason} {caught.value.message}"


async def live(suite: Suite, name: str) -> set[tuple[str, str]]:
    stub = lineage_pb2_grpc.LineageStub(suite.registry.channel)
    found = await stub.GetLineage(lpb.GetLineageRequest(name=name, live_only=True))
    return {(use.consumer.removeprefix("deployments/"), use.resource) for use in found.uses}


def gone(suite: Suite, name: str) -> Callable[[], Any]:
    """Whether it could be deleted now."""

    async def condition() -> bool:
        try:
            await delete(suite, name)
        except EkibenError:
            return False
        return True

    return condition


async def test_a_deployment_keeps_what_it_uses_until_it_is_gone(suite: Suite, tmp_path: Path) -> None:
    first, second = await push(suite, tmp_path, "v1"), await push(suite, tmp_path, "v2")
    await suite.create("demo", first)
    for name in (first, model_of(first)):
        assert "deployments/demo/revisions/1" in await refusal(suite, name)
    update = pb.Deployment(name="deployments/demo", template=pb.Template(bento=second))
    await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=update))
    assert "deployments/demo/revisions/2" in await refusal(suite, second)
    await until(gone(suite, first), "the first bento is free")
    await delete(suite, model_of(first))
    stub = lineage_pb2_grpc.LineageStub(suite.registry.channel)
    former = await stub.GetLineage(lpb.GetLineageRequest(name=first))
    assert {use.consumer for use in former.uses} == {"deployments/demo/revisions/1", first}
    await suite.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name="deployments/demo"))
    await until(gone(suite, second), "the second bento is free")


async def test_a_rollback_to_a_deleted_bento_is_refused_and_changes_nothing(suite: Suite, tmp_path: Path) -> None:
    first, second = await push(suite, tmp_path, "v1"), await push(suite, tmp_path, "v2")
    await suite.create("demo", first)
    update = pb.Deployment(name="deployments/demo", template=pb.Template(bento=second))
    after = await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=update))
    await delete(suite, first, force=True)
    with pytest.raises(NotFound) as caught:
        await suite.deployments.RollbackDeployment(pb.RollbackDeploymentRequest(name="deployments/demo"))
    assert caught.value.reason == "BENTO_NOT_FOUND"
    assert (await suite.get("demo")).latest_revision == after.latest_revision
    for name in (second, model_of(second)):
        assert ("demo/revisions/2", name) in await live(suite, name)


async def test_a_rollback_to_a_deleted_secret_is_refused_and_changes_nothing(suite: Suite, tmp_path: Path) -> None:
    bento, vault = await push(suite, tmp_path, "v1"), SecretsStub(suite.registry.channel)
    item = identity_pb2.Secret.Item(key="TOKEN", value="s3cret")
    secret = identity_pb2.Secret(name="secrets/hub", kind=identity_pb2.Secret.ENV, items=[item])
    await vault.CreateSecret(identity_pb2.CreateSecretRequest(secret=secret))
    await suite.create("demo", bento, template=pb.Template(secrets=["secrets/hub"]))
    update = pb.Deployment(name="deployments/demo", template=pb.Template(bento=bento))
    mask = FieldMask(paths=["template"])
    request = pb.UpdateDeploymentRequest(deployment=update, update_mask=mask)
    after = await suite.deployments.UpdateDeployment(request)
    await vault.DeleteSecret(identity_pb2.DeleteSecretRequest(name="secrets/hub"))
    with pytest.raises(NotFound) as caught:
        await suite.deployments.RollbackDeployment(pb.RollbackDeploymentRequest(name="deployments/demo"))
    assert caught.value.reason == "SECRET_NOT_FOUND"
    assert (await suite.get("demo")).latest_revision == after.latest_revision


async def test_a_deployer_that_is_killed_before_it_tells_of_an_end_finds_it_when_it_is_back(
    tmp_path: Path,
    short_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, run = tmp_path / "deployer", short_path / "run"
    async with running_registry(short_path) as registry:
        async with running_deployer(registry, data, run, gateway=False) as suite:
            bento = await push(suite, tmp_path, "v1")
            await suite.create("demo", bento)
            await until(lambda: reported(registry), "the deployment's uses are told")

            async def silent(self: Uses, deployment: Any) -> None:
                raise Unavailable("The process was killed here.", reason="KILLED")

            monkeypatch.setattr(Uses, "gone", silent)
            await suite.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name="deployments/demo"))

            async def removed() -> bool:
                try:
                    await suite.get("demo")
                except NotFound:
                    return True
                return False

            await until(removed, "the deployment is removed")
            assert "BENTO_IN_USE" in await refusal(suite, bento)
        monkeypatch.undo()
        async with running_deployer(registry, data, run, gateway=False) as suite:
            await until(gone(suite, bento), "what nobody uses any more is free")


async def test_a_deployment_that_was_only_claimed_holds_its_bento_no_longer_than_a_claim(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deployer killed between claim and row: the owner is swept once the claim has lapsed."""
    bento = await push(suite, tmp_path, "v1")

    async def killed(*_: Any) -> bool:
        raise Unavailable("The process was killed here.", reason="KILLED")

    monkeypatch.setattr("services.deployer.store.Store.add_deployment", killed)
    monkeypatch.setattr("services.registry.lineage._CLAIM", timedelta(seconds=0.5))
    monkeypatch.setattr(loop, "SWEEP_S", 0.0)
    monkeypatch.setattr(loop, "LOOK_S", 0.05)
    with pytest.raises(Unavailable):
        await suite.create("demo", bento)
    assert await live(suite, model_of(bento)) >= {("demo/revisions/1", bento)}
    await until(gone(suite, bento), "a claim that nobody confirmed has lapsed")
