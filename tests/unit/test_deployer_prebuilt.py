"""Images that somebody else made, and models apart: what may be asked for, and what replicas are then told."""

import asyncio

import pytest

from ekiben.builder.v1 import builder_pb2, images_pb2
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import images_pb2 as asked
from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument
from services.deployer import prebuilt, specs
from services.deployer.builds import Builds, Output, Way
from services.kernel.clock import ManualClock
from services.kernel.identity import Principal
from tests.deployment_rows import a_deployment, a_revision

DIGEST = f"sha256:{'ab' * 32}"


def template(reference: str = "", *secrets: str) -> pb.Template:
    found = pb.Template(bento="bentoRepositories/iris/bentos/v1")
    if reference:
        found.image.CopyFrom(asked.PrebuiltImage(reference=reference, pull_secrets=secrets))
    return found


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (f"registry.example.com/team/iris:v1@{DIGEST}", f"docker://registry.example.com/team/iris:v1@{DIGEST}"),
        (f"docker://localhost:5000/iris@{DIGEST}", f"docker://localhost:5000/iris@{DIGEST}"),
        (f"iris@{DIGEST}", f"docker://docker.io/library/iris@{DIGEST}"),
    ],
)
async def test_a_digest_is_taken_at_its_word_and_kept_as_it_is(given: str, kept: str) -> None:
    one = template(given, "own")
    await prebuilt.settle(one, "kubernetes")
    assert one.image.reference == kept
    await prebuilt.settle(one, "kubernetes")
    assert one.image.reference == kept and specs.versions_of(a_revision(a_deployment(), one))[0].image == kept


@pytest.mark.parametrize(
    ("one", "runtime", "reason"),
    [
        (template(f"h.example/iris@{DIGEST}"), "process", "RUNTIME_WITHOUT_IMAGES"),
        (template(f"h.example/iris@{DIGEST}", "own"), "podman", "PULL_SECRETS_UNSUPPORTED"),
        (template(f"h.example/iris@{DIGEST}", "Own_Secret"), "kubernetes", "FIELDS_INVALID"),
        (template("oci:/srv/images:v1"), "kubernetes", "IMAGE_NAME_INVALID"),
        (template("h.example/Iris:v1"), "kubernetes", "IMAGE_NAME_INVALID"),
        (template("h.example/iris@sha256:12"), "kubernetes", "IMAGE_NAME_INVALID"),
        (pb.Template(image=asked.PrebuiltImage()), "kubernetes", "FIELDS_INVALID"),
        (pb.Template(model_delivery=asked.IMAGE_VOLUME), "podman", "MODEL_DELIVERY_UNSUPPORTED"),
        (
            pb.Template(
                model_delivery=asked.IMAGE_VOLUME, image=asked.PrebuiltImage(reference=f"h.example/iris@{DIGEST}")
            ),
            "kubernetes",
            "FIELDS_INVALID",
        ),
    ],
)
async def test_what_a_runtime_cannot_do_is_refused_in_words(one: pb.Template, runtime: str, reason: str) -> None:
    with pytest.raises(EkibenError) as refused:
        await prebuilt.settle(one, runtime)
    assert refused.value.reason == reason and isinstance(refused.value, FailedPrecondition | InvalidArgument)


async def test_a_canary_has_an_image_of_its_own_and_models_as_the_deployment_has_them() -> None:
    one = template()
    one.model_delivery = asked.IMAGE_VOLUME
    one.canary.versions["next"].image.reference = f"h.example/next@{DIGEST}"
    one.canary.versions["small"].weight_percent = 10
    await prebuilt.settle(one, "kubernetes")
    found = {
        each.target: (each.image, each.models_apart) for each in specs.versions_of(a_revision(a_deployment(), one))
    }
    assert found == {"main": ("", True), "next": (f"docker://h.example/next@{DIGEST}", False), "small": ("", True)}


async def test_the_settings_speak_for_a_template_that_says_nothing_when_it_is_written() -> None:
    silent, said, given = template(), template(), template(f"h.example/iris@{DIGEST}")
    said.model_delivery = asked.LAYERS
    for one in (silent, said, given):
        await prebuilt.settle(one, "kubernetes", prebuilt.MOUNTED)
    assert [one.model_delivery for one in (silent, said, given)] == [asked.IMAGE_VOLUME, asked.LAYERS, 0]
    elsewhere = template()
    await prebuilt.settle(elsewhere, "process", prebuilt.MOUNTED)
    assert not elsewhere.model_delivery
    await prebuilt.settle(silent, "kubernetes")
    assert silent.model_delivery == asked.IMAGE_VOLUME


class Builder:
    """Answers each build with what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def CreateBuild(self, request: builder_pb2.CreateBuildRequest) -> builder_pb2.Build:
        self.asked.append(request.output)
        return builder_pb2.Build(name="builds/b1", state=builder_pb2.Build.SUCCEEDED, image="images/i1")

    async def GetImage(self, request: images_pb2.GetImageRequest) -> images_pb2.Image:
        image = images_pb2.Image(name=request.name, digest=DIGEST, location="oci:/images:iris:IMAGE-1")
        image.layers.add(content="bento iris:v1")
        if self.asked[-1] == builder_pb2.Build.IMAGE_AND_MODELS:
            image.layers.add(model="modelRepositories/weights/models/m1", image="sha256:model")
        return image


async def test_each_way_gets_its_own_and_a_given_image_is_not_built() -> None:
    builder, caller = Builder(), Principal("users/admin", "default", 5)
    builds = Builds(builder, builder, Output.IMAGE, ManualClock())
    async with asyncio.TaskGroup() as tasks:
        ways = (Way(), Way(models_apart=True), Way(image=f"docker://h.example/iris:v1@{DIGEST}"))
        found = [builds.want(tasks, ("u", 1), "bento", "sha256:0", (), caller, "", way) for way in ways]
    plain, apart, given = (progress.made for progress in found)
    assert builder.asked == [builder_pb2.Build.IMAGE, builder_pb2.Build.IMAGE_AND_MODELS]
    assert plain is not None and plain.model_images == ()
    assert apart is not None and apart.model_images == (("modelRepositories/weights/models/m1", "sha256:model"),)
    assert given is not None and (given.image, given.digest) == (ways[2].image, DIGEST) and not found[2].build
