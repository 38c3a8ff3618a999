"""The image of a bento: what the builder's worker and `ekiben images build` both call.

Whoever calls it has the bento's folder and its recipe; the base says for which Python and platform that is resolved.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.utils import canonicalize_name

from ekiben.errors import FailedPrecondition
from services.builder import base_rules, compilers, images, sources
from services.builder.assembler import Assembler, Model, Parts
from services.builder.attesting import Attestor, Part
from services.builder.bases import BaseImage
from services.builder.commands import make_commands, secrets_of
from services.builder.compression import Method
from services.builder.domain import Step
from services.builder.engine import Engine, Secret
from services.builder.executions import Executions
from services.builder.image_environments import ImageEnvironment, ImageEnvironments
from services.builder.interpreters import Interpreters
from services.builder.locks import Lock, Work
from services.builder.recipe import BentoFiles, Recipe
from services.builder.runs import Runs
from services.builder.sources import Sources
from services.builder.targets import Target
from services.content.digest import Digest
from services.content.images import INDEX, MANIFEST, BlobsMissing, Descriptor, ImageStore, Platform
from services.content.images.doubting import DoubtingImageStore


@dataclass(frozen=True)
class Source:
    """What an image is made from."""

    bento: Path
    """The unpacked bento; nothing below it is changed."""
    files: BentoFiles
    """What was read of it."""
    recipe: Recipe
    models: Sequence[Model] = ()
    secrets: Sequence[Secret] = ()
    """Variables that the bento's commands find, and that its image does not hold."""
    refresh_commands: bool = False
    """Whether commands run again that ran before, so that packages of the system are the newest."""

    from_source: Sequence[str] = ()
    """Packages that are built from source, besides those that the bento's requirements name (`--no-binary`)."""
    models_apart: bool = False
    """Whether each model is an image of its own, listed in the image's index, instead of a layer of the image."""

    @property
    def tag(self) -> str:
        """`repository:version`."""
        return f"{self.files.manifest.get('name')}:{self.files.manifest.get('version')}"


def check(files: BentoFiles, engine: Engine | None, platforms: Sequence[Platform] = ()) -> None:
    """Refuse a bento whose image cannot be made, before any work is done for it.

    Raises:
        FailedPrecondition: its variables cannot be those of an image (BENTO_INCOMPLETE), or it runs commands while its
            image is built, and they cannot be run (reasons of `make_commands` and `Engine.check`).
    """
    images.envs_of(files.manifest)
    if make_commands(files):
        if engine is None:
            raise FailedPrecondition(
                "The bento runs commands while its image is built (packages of the system, scripts or a Dockerfile "
                "template), and nothing here runs them. Build its image by `ekiben images build`.",
                reason="ENGINE_MISSING",
            )
        engine.check(platforms)


@dataclass(frozen=True)
class Workshop:
    """What an image is made with. One per process, for all of its builds."""

    cache: Path
    """A folder in which is remembered what was made; several builds may use it at once."""
    environments: ImageEnvironments
    interpreters: Interpreters
    engine: Engine | None = None
    """Runs what bentos run while their images are built; without one these are refused."""
    attestor: Attestor | None = None
    """Attaches to an image what there is to say of it, and signs it, before its reference names it."""


async def build_image(
    source: Source,
    platforms: Sequence[Platform],
    *,
    base: str,
    into: ImageStore,
    reference: str,
    workshop: Workshop,
    work: Work,
    compression: Method = Method.GZIP,
    refresh_base: bool = False,
) -> Descriptor:
    """Make the image, and have `reference` in `into` name it, last of all; what names it there.

    One platform gives an image, several give an index of images; so does one whose models are apart. A crash leaves
    blobs that nothing names; the next build takes them for its own and gives the same digest.

    Args:
        base: the image to put layers on, or a rule for it; see `base_rules.choose`.
        refresh_base: whether to ask what its name stands for now, instead of taking what it stood for before.
        compression: how layers are packed; see `compression.Rules` for what a target can read.

    Raises:
        EkibenError: it cannot be built; reasons are those of `check`, `base_rules`, `Base.python`, uv's (`failures`)
            and `Assembler.assemble`; `BlobsMissing` where the store does not keep what it is given.
    """
    check(source.files, workshop.engine, platforms)
    name = base_rules.choose(base, source.files, source.recipe.python)
    ours = name == base_rules.choose(base, BentoFiles({}, ""), source.recipe.python)
    async with base_rules.opened(name, platforms, workshop.cache, refresh=refresh_base, say=work.say) as found:
        bases = [replace(each, ours=ours) for each in found]
        try:
            return await _build(source, bases, into, reference, workshop, work, compression)
        except BlobsMissing as exc:
            work.say(f"{into.name} lost layers that it said to have: sending them once more.")
            doubted = DoubtingImageStore(into, exc.digests)
            return await _build(source, bases, doubted, reference, workshop, work, compression)


async def _build(
    source: Source,
    bases: Sequence[BaseImage],
    into: ImageStore,
    reference: str,
    workshop: Workshop,
    work: Work,
    compression: Method,
) -> Descriptor:
    made: list[tuple[Part, Platform]] = []
    like: Lock | None = None
    runs = _runs(source, workshop, work)
    for base in bases:
        if runs is not None and runs.commands.before is not None:
            await work.report(Step.RUNNING_COMMANDS, 0, 0)
        found = base if runs is None else await runs.prepare(base, workshop.cache / "bases")
        # What the bento's commands left is part of the image and starts nothing here: `base` may.
        parts = replace(await _parts(source, found, base if base.ours else None, workshop, work, like), runs=runs)
        like = parts.environment.lock
        await work.report(Step.ASSEMBLING, 0, 0)
        content, runs_on = await Assembler(workshop.cache, work.say, compression).assemble(parts, found, into)
        made.append((_part(content, parts.environment, found.about.packages), runs_on))
    content, media_type, named = made[0][0].manifest, MANIFEST, made[0][0].image
    models = source.models if source.models_apart else ()
    mounted = await Assembler(workshop.cache, work.say, compression).models(models, [each for _, each in made], into)
    if len(made) > 1 or mounted or workshop.attestor is not None:
        for part, _ in made:
            await into.keep(part.manifest, MANIFEST)
    if len(made) > 1 or mounted:
        content = images.index_of([*(replace(part.image, platform=runs_on) for part, runs_on in made), *mounted])
        named, media_type = await into.keep(content, INDEX), INDEX
    if workshop.attestor is not None:
        await workshop.attestor.attest(into, named, [part for part, _ in made], source.tag, work.say)
    return await into.tag(reference, content, media_type, made[0][1] if media_type == MANIFEST else None)


def _part(manifest: bytes, environment: ImageEnvironment, system: Sequence[str]) -> Part:
    image = Descriptor(MANIFEST, Digest(hashlib.sha256(manifest).hexdigest()), len(manifest))
    return Part(
        image,
        manifest,
        environment.path,
        environment.digest,
        environment.lock.text,
        environment.target.python,
        system,
    )


def _runs(source: Source, workshop: Workshop, work: Work) -> Runs | None:
    given = {each.name: each for each in source.secrets}
    for name, value in secrets_of(source.files.manifest).items():
        if name not in given and value:
            given[name] = Secret(name, value, public=True)
    commands = make_commands(source.files, sorted(given))
    if workshop.engine is None or not commands:
        return None
    for name in sorted(set(secrets_of(source.files.manifest)) - set(given)):
        work.say(f"WARNING: the variable {name}, which the bento's commands may need, has no value.")
    executions = Executions(workshop.cache / "executed", workshop.engine, work.say, again=source.refresh_commands)
    models = {model.tag: model.folder for model in source.models}
    return Runs(executions, commands, [given[name] for name in sorted(given)], source.bento, models)


async def _parts(
    source: Source, base: BaseImage, trusted: BaseImage | None, workshop: Workshop, work: Work, like: Lock | None
) -> Parts:
    python = base.about.python(source.recipe.python, base.name)
    recipe, cache = source.recipe, workshop.cache
    from_source = tuple(sorted({*map(canonicalize_name, source.from_source), *sources.named_by(recipe.options)}))
    target = Target(images.platform_of(base.image), python.version, base.about.libc, from_source)
    work.say(f"Base image {base.name} ({base.descriptor.digest}): {target} at {python.path}.")
    locks, manifest = workshop.environments.locks, source.files.manifest
    builds = Sources(cache, workshop.engine, locks, recipe, manifest, base, python.path, target, work)
    environment = await workshop.environments.make(recipe, target, source.bento, work, like=like, build=builds.build)
    for name in sorted({*map(canonicalize_name, source.from_source)} - environment.lock.packages.keys()):
        work.say(f"WARNING: {name}, which was to be built from source, is none of the bento's packages.")
    compiler = await compilers.find(trusted, python, cache, workshop.interpreters, work.say)
    manifest = source.files.manifest
    return Parts(source.tag, source.bento, environment, compiler, manifest, source.models, source.models_apart)
