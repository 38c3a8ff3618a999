"""A build's second half: from a bento's environment to its image in the platform's place, and what to tell of it."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ekiben import names
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition
from ekiben.registry.v1 import registry_pb2
from services.builder import base_rules, image_builds, images
from services.builder.assembler import Model, Streamed
from services.builder.compression import Method
from services.builder.domain import Build, Image, ImageLayer, Output, model_of
from services.builder.image_builds import Source, Workshop
from services.builder.layers import CHUNK_BYTES, Entry
from services.builder.locks import Work
from services.builder.places import Place, build_tag, id_of, pin_of, repository_of, tag_of
from services.builder.recipe import hub_models
from services.builder.store import ImageRows
from services.content.fetching import Incoming
from services.content.images import Descriptor, ImageStore, Platform
from services.content.images import Image as Content
from services.content.images.layout import LayoutImageStore
from services.content.images.resolving import read_json
from services.content.tar import TarReader
from services.kernel.clock import Clock
from services.kernel.identity import Principal
from services.kernel.peers import on_behalf_of

if TYPE_CHECKING:
    from ekiben.registry.v1 import registry_pb2_grpc

Fetch = Callable[[str, Path], Awaitable[str]]
"""Unpacks the content of a resource as a folder and gives its digest."""
Open = Callable[[str], AbstractAsyncContextManager[Incoming]]
"""The content of a resource as it comes."""
Say = Callable[[str], None]


class ImageWork:
    """Makes the images of builds."""

    def __init__(
        self,
        place: Place,
        rows: ImageRows,
        workshop: Workshop,
        bentos: "registry_pb2_grpc.BentosAsyncStub",
        models: "registry_pb2_grpc.ModelsAsyncStub",
        fetch: Fetch,
        open_content: Open,
        clock: Clock,
        failpoint: Callable[[str], Awaitable[None]],
        compression: Method = Method.GZIP,
    ) -> None:
        self.place = place
        self._compression = compression
        self._rows = rows
        self.engine = workshop.engine
        """What runs the commands of bentos."""
        self._workshop = workshop
        self._bentos = bentos
        self._models = models
        self._fetch = fetch
        self._open = open_content
        self._clock = clock
        self._failpoint = failpoint

    async def make(self, build: Build, source: Source, work: Work) -> tuple[Image, Build, bool]:
        """Make the image of a bento without its models, which are found here, and tag it.

        Also gives the build with the models that were found, and whether the image was there.

        Raises:
            EkibenError: as `image_builds.build_image`; also where a model was deleted (MODEL_NOT_FOUND), has no
                content (MODEL_NOT_UPLOADED) or another one meanwhile (MODEL_CHANGED), or where the base is another
                organization's (BASE_DENIED).
        """
        organization = names.Organization.parse(build.organization).organization
        base_rules.check_own(build.base, source.files, self.place.url, organization)
        models = await self._models_of(build, work, hub_models(source.files.manifest))
        apart = bool(models) and build.output is Output.IMAGE_AND_MODELS
        build = replace(build, models=[model_of(name, model.key) for name, model in models])
        source = replace(source, models=[model for _, model in models], models_apart=apart)
        bento = names.Bento.parse(build.bento)
        repository = repository_of(build.organization, bento)
        platforms = [Platform.parse(each) for each in build.platforms]
        async with self.place.open(repository, work.say) as (store, _):
            tag = tag_of(bento.bento, models_apart=apart)
            made_as = build_tag(build.id) if self.place.layout is not None else tag
            descriptor = await image_builds.build_image(
                source,
                platforms,
                base=build.base,
                into=store,
                reference=self.place.reference(repository, made_as),
                workshop=self._workshop,
                work=work,
                compression=self._compression,
                refresh_base=build.force,
            )
            image = id_of(descriptor.digest)
            pin = self.place.reference(repository, pin_of(image))
            manifest = b"".join([chunk async for chunk in store.read(descriptor)])
            await self._failpoint("tag")
            if isinstance(store, LayoutImageStore):
                named = [pin, self.place.reference(repository, tag)]
                await store.move(named, descriptor, away=[self.place.reference(repository, made_as)])
            else:
                await store.tag(pin, manifest, descriptor.media_type, descriptor.platform)
            content = [(platform, (await store.resolve(pin, platform))[1]) for platform in platforms]
            mounted = await mounted_in(store, manifest)
        layers = [*(layer for where, one in content for layer in layers_of(where, one)), *mounted]
        now = self._clock.now()
        made = Image(
            id=image,
            organization=build.organization,
            place=self.place.name,
            digest=str(descriptor.digest),
            media_type=descriptor.media_type,
            bento=build.bento,
            bento_digest=build.bento_digest,
            repository=repository,
            tag=tag,
            platforms=tuple(build.platforms),
            size_bytes=sum({layer.digest: layer.size_bytes for layer in layers}.values()) + len(manifest),
            layers=layers,
            base=base_of(content[0][1]),
            models=tuple(name for name, _ in models),
            build=build.id,
            create_time=now,
            use_time=now,
        )
        return made, build, await self._rows.get(build.organization, image) is not None

    async def _models_of(self, build: Build, work: Work, elsewhere: Container[str]) -> Sequence[tuple[str, Model]]:
        """The models of the build's bento, each with its resource name; fetched when they are needed. Those whose tags
        are `elsewhere` are not in the registry."""
        found = []
        with on_behalf_of(Principal(build.creator, build.organization, Role.ROLE_DEVELOPER)):
            bento = await self._bentos.GetBento(registry_pb2.GetBentoRequest(name=build.bento))
            for name in bento.models:
                tagged = names.Model.parse(name)
                if f"{tagged.repository}:{tagged.model}" in elsewhere:
                    continue
                model = await self._models.GetModel(registry_pb2.GetModelRequest(name=name))
                if model.content.state != registry_pb2.Content.READY:
                    raise FailedPrecondition(
                        f"Model {model.name} of the bento has no content yet. Push it, then build.",
                        reason="MODEL_NOT_UPLOADED",
                        model=model.name,
                    )
                found.append((model.name, self._model(model, work.directory, work.say)))
        return found

    def _model(self, model: registry_pb2.Model, directory: Path, say: Say) -> Model:
        name = names.Model.parse(model.name)

        async def begin() -> None:
            say(f"Fetching model {name.repository}:{name.model} ({model.content.size_bytes / (1 << 20):.1f} MiB).")
            await self._failpoint("model")

        def check(found: str) -> None:
            if found != model.content.digest:
                # Its layer would be remembered as that of what was there before.
                raise FailedPrecondition(
                    f"Model {model.name} was pushed again while its image was built. Build again.",
                    reason="MODEL_CHANGED",
                    model=model.name,
                )

        @asynccontextmanager
        async def stream() -> AsyncIterator[Streamed]:
            await begin()
            async with self._open(model.name) as content:
                check(str(content.digest))
                yield Streamed(entries_in(content), content.stop)

        @asynccontextmanager
        async def folder() -> AsyncIterator[Path]:
            into = directory / "models" / model.content.digest.removeprefix("sha256:")
            into.parent.mkdir(exist_ok=True)
            await begin()
            try:
                check(await self._fetch(model.name, into))
                yield into
            finally:
                # At once: the next one may need the space.
                await asyncio.to_thread(shutil.rmtree, into, ignore_errors=True)

        return Model(f"{name.repository}:{name.model}", model.content.digest, folder, stream)


def entries_in(content: Incoming) -> Iterator[Entry]:
    """The files and folders of a model's archive as they come; where another archive than that came, an error at the
    end. Blocks, and is to be read through by one thread."""
    with content.checked() as source:
        reader = TarReader(source)
        for member in reader:
            if member.folder:
                yield Entry(member.path)
            else:
                data = iter(partial(reader.read, CHUNK_BYTES), b"")
                executable = bool(member.mode & 0o100)
                yield Entry(member.path, content=data, size_bytes=member.size_bytes, executable=executable)


def layers_of(platform: Platform, image: Content) -> list[ImageLayer]:
    """The layers of an image, each with what its history says that it holds."""
    told = [each for each in image.config.get("history") or () if not each.get("empty_layer")]
    contents = [str(each.get("created_by") or "") if each.get("comment") == "ekiben" else "" for each in told]
    contents = ["", *contents] if len(contents) < len(image.layers) else contents
    return [
        ImageLayer(str(layer.digest), layer.size_bytes, layer.media_type, content, str(platform))
        for layer, content in zip(image.layers, contents[-len(image.layers) :], strict=False)
    ]


async def mounted_in(store: ImageStore, index: bytes) -> list[ImageLayer]:
    """The layers of images that an image's index lists to be mounted into it."""
    found = []
    for entry in map(Descriptor.from_json, json.loads(index).get("manifests") or ()):
        if not (tag := entry.annotations.get(images.MODEL)):
            continue
        manifest = await read_json(store, entry)
        if manifest.get("manifests"):
            manifest = await read_json(store, Descriptor.from_json(manifest["manifests"][0]))
        layer = Descriptor.from_json(manifest["layers"][0])
        model = str(names.Model(*tag.split(":", 1)))
        about = (str(layer.digest), layer.size_bytes, layer.media_type, f"model {tag}")
        found.append(ImageLayer(*about, model=model, image=str(entry.digest)))
    return found


def base_of(image: Content) -> str:
    """The base image as it was named, and by its digest."""
    named = [image.annotations.get(f"org.opencontainers.image.base.{part}", "") for part in ("name", "digest")]
    return "@".join(part for part in named if part)
