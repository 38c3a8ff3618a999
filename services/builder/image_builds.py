"""The image of a bento for one platform: what the builder's worker and `ekiben images build` both call.

Whoever calls it has the bento's folder and its environment; this decides which layers go on which base, and where.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ekiben.errors import FailedPrecondition
from services.builder import images
from services.builder.assembler import Assembler, Model, Parts
from services.builder.compression import Method
from services.builder.domain import Environment
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


def check(files: BentoFiles) -> None:
    """Refuse a bento whose image cannot be assembled, before any work is done for it.

    Raises:
        FailedPrecondition: it runs commands while its image is built (IMAGE_NEEDS_COMMANDS).
    """
    if files.scripts or images.commands_of(files.manifest):
        raise FailedPrecondition(
            "The bento runs commands while its image is built (apt packages, scripts or a Dockerfile template). "
            "Images of such bentos are not built here yet: use `bentoml containerize`.",
            reason="IMAGE_NEEDS_COMMANDS",
        )


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
) -> Descriptor:
    """Make the image, and have `reference` in `into` name it, last of all; what names it there.

    A crash leaves blobs that nothing names; the next build takes them for its own and gives the same digest.

    Args:
        base: the image to put layers on, as `open_images` reads it.
        cache: a folder in which is remembered what was made; several builds may use it at once.
        say: takes lines for people.
        compression: how layers are packed; see `compression.Rules` for what a target can read.

    Raises:
        EkibenError: it cannot be built; reasons are those of `check`, `open_images` and `Assembler.assemble`.
    """
    check(source.files)
    parts = Parts(
        source.tag,
        source.bento,
        source.environment_path,
        source.environment.digest,
        source.environment.python_version,
        source.environment.bentoml_version,
        source.files.manifest,
        source.models,
    )
    async with open_images(base) as (base_store, base_name):
        return await Assembler(cache, say, compression).assemble(
            parts, base_store, base_name, into, reference, platform
        )
