"""The image of a bento for one platform: what the builder's worker and `ekiben images build` both call.

Whoever calls it has the bento's folder and its environment; this decides which layers go on which base, and where.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ekiben.errors import FailedPrecondition
from services.builder.assembler import Assembler, Model, Parts
from services.builder.commands import make_commands, secrets_of
from services.builder.compression import Method
from services.builder.domain import Environment
from services.builder.engine import Engine, Secret
from services.builder.executions import Executions
from services.builder.locks import Lock
from services.builder.recipe import BentoFiles
from services.content import open_images
from services.content.images import Descriptor, ImageStore, Platform


@dataclass(frozen=True)
class Source:
    """What an image is made from."""

    bento: Path
    """The unpacked bento; nothing below it is changed."""
    files: BentoFiles
    """What was read of it."""
    lock: Lock
    environment: Environment
    """Of the bento's lock, as local replicas run in it."""
    environment_path: Path
    models: Sequence[Model] = ()

    @property
    def tag(self) -> str:
        """`repository:version`."""
        return f"{self.files.manifest.get('name')}:{self.files.manifest.get('version')}"


def check(files: BentoFiles, engine: Engine | None = None) -> None:
    """Refuse a bento whose image cannot be made, before any work is done for it.

    Raises:
        FailedPrecondition: it runs commands while its image is built, and they cannot be run (reasons of
            `make_commands`, ENGINE_MISSING).
    """
    if make_commands(files):
        if engine is None:
            raise FailedPrecondition(
                "The bento runs commands while its image is built (packages of the system, scripts or a Dockerfile "
                "template), and nothing here runs them. Build its image by `ekiben images build`.",
                reason="ENGINE_MISSING",
            )
        engine.check()


async def build_image(
    source: Source,
    platform: Platform,
    *,
    base: str,
    into: ImageStore,
    reference: str,
    cache: Path,
    say: Callable[[str], None],
    compression: Method = Method.GZIP,
    engine: Engine | None = None,
    secrets: Sequence[Secret] = (),
    again: bool = False,
) -> Descriptor:
    """Make the image, and have `reference` in `into` name it, last of all; what names it there.

    A crash leaves blobs that nothing names; the next build takes them for its own and gives the same digest.

    Args:
        base: the image to put layers on, as `open_images` reads it.
        cache: a folder in which is remembered what was made; several builds may use it at once.
        say: takes lines for people.
        engine: runs what the bento runs while its image is built.
        secrets: what its commands find in their environment, and the image does not hold.
        again: run commands that ran before, so that packages of the system are the newest.
        compression: how layers are packed; see `compression.Rules` for what a target can read.

    Raises:
        EkibenError: it cannot be built; reasons are those of `check`, `open_images` and `Assembler.assemble`.
    """
    check(source.files, engine)
    given = {each.name: each for each in secrets}
    for name, value in secrets_of(source.files.manifest).items():
        if name not in given and value:
            given[name] = Secret(name, value, public=True)
        elif name not in given:
            say(f"WARNING: the variable {name}, which the bento's commands may need, has no value.")
    parts = Parts(
        source.tag,
        source.bento,
        source.environment_path,
        source.environment.digest,
        source.environment.python_version,
        source.environment.bentoml_version,
        source.files.manifest,
        source.models,
        make_commands(source.files, sorted(given)),
        [given[name] for name in sorted(given)],
    )
    executions = Executions(cache / "executed", engine, say, again=again) if engine else None
    async with open_images(base) as (base_store, base_name):
        return await Assembler(cache, say, compression, executions).assemble(
            parts, base_store, base_name, into, reference, platform
        )
