"""Which base a bento's image is put on, and remembering what a name stood for.

cache/bases/pins.json       name and platform → descriptor of its manifest

A name in a registry such as `python:3.11-slim` stands for something else each week, and images of equal bentos would
differ by it. So it is resolved once; that digest is used until somebody asks anew.
"""

import asyncio
import contextlib
import fcntl
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from services.builder import containerfiles
from services.builder.bases import BaseImage, open_base
from services.builder.commands import images_named
from services.builder.images import asks_for_system
from services.builder.platforms import here
from services.builder.recipe import BentoFiles
from services.content import open_images
from services.content.files import make_folder, write_whole
from services.content.images import Descriptor, Platform
from services.content.images.registry.names import Location, parse

USUAL = "docker://docker.io/library/python:{python}-slim"
"""As BentoML's own images have it."""
_PLACE = "{python}"
_REGISTRY = "docker://"
_FILE = re.compile(r"(containers-storage|dir|(docker|oci)-archive|docker-daemon|oci|ostree|sif|tarball):")
"""Transports of the engine that lead to what this machine has. Source: containers-transports(5)."""
_BENTOMLS = re.compile(r"(?:docker\.io/)?(?:library/)?python:3\.\d+(?:\.\d+)?-slim(?:-\w+)?")
"""What the client writes for a bento that asks for nothing: that is a matter of the rule."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}$")


def choose(base: str, files: BentoFiles, python: str) -> str:
    """The name of a bento's base, as `open_images` reads it.

    `base` is an image, or a rule with `{python}` where the minor version goes. A rule is for bentos that name no base
    of their own, nor a distribution or CUDA; an image is for every bento. Empty is the usual rule.

    Raises:
        InvalidArgument: the rule has braces with something else in them (BASE_RULE_INVALID).
        FailedPrecondition: nobody can say what the bento's Dockerfile begins with (TEMPLATE_UNSUPPORTED).
    """
    base = base or USUAL
    if re.search(r"[{}]", base.replace(_PLACE, "")):
        raise InvalidArgument(
            f"The rule for base images {base!r} is refused: only {_PLACE} may stand in braces, as in {USUAL}.",
            reason="BASE_RULE_INVALID",
            rule=base,
        )
    if _PLACE not in base:
        return base
    return _own(files) or base.replace(_PLACE, ".".join(python.split(".")[:2]))


def check_own(base: str, files: BentoFiles, images: str, organization: str) -> None:
    """Refuse what a bento names among the images which the builder keeps for others: as its base, or to copy from.

    It would be pulled with the builder's login, which may read them all, or read from this machine's files. What the
    rule itself says is its owner's.

    Args:
        base: see `choose`.
        images: where the builder keeps images, `oci:FOLDER` or `docker://HOST[/PREFIX]`; each organization has its own
            below.
        organization: whose bento it is, without `organizations/`.

    Raises:
        FailedPrecondition: see `choose`.
        PermissionDenied: it lies there and is not the organization's own, whether it exists or not, or it is on this
            machine, or it cannot be said what it is (BASE_DENIED).
    """
    named = [_own(files)] if _PLACE in (base or USUAL) else []
    if isinstance(files.manifest.get("image"), Mapping):
        named += images_named(files.manifest)
    else:  # else nothing runs its Dockerfile
        named += containerfiles.copied_from(files.dockerfile)
    for each in filter(None, named):
        if _FILE.match(each) or "$" in each:
            raise PermissionDenied(
                f"The bento's Dockerfile, or a command of it, takes an image from {each!r}. Here it may name images in "
                "registries only, and without variables.",
                reason="BASE_DENIED",
                image=each,
            )
        if images.startswith(_REGISTRY) and _is_anothers(each, images, organization):
            raise PermissionDenied(
                f"The image {each} that the bento names lies where this platform keeps those of its organizations, and "
                f"is not one of {organization}. Keep bases for all elsewhere, or name an image of your own.",
                reason="BASE_DENIED",
                image=each,
            )


def _is_anothers(named: str, images: str, organization: str) -> bool:
    wanted = parse(named.removeprefix(_REGISTRY))
    ours = parse(f"{images.removeprefix(_REGISTRY).rstrip('/')}/{organization}/x")
    prefix = ours.repository.removesuffix(f"{organization}/x")
    return (
        _host(wanted) == _host(ours)
        and wanted.repository.startswith(prefix)
        and not wanted.repository.startswith(f"{prefix}{organization}/")
    )


def _own(files: BentoFiles) -> str:
    """The base that a bento itself names; empty where it leaves that to the rule."""
    image, docker = (
        section if isinstance(section := files.manifest.get(name), Mapping) else {} for name in ("image", "docker")
    )
    named = [str(section.get("base_image") or "") for section in (image, docker)]
    if not image and files.dockerfile and (asks_for_system(docker) or docker.get("dockerfile_template")):
        named = [containerfiles.base_of(files.dockerfile)]
        if not named[0]:
            raise FailedPrecondition(
                "The last stage of the bento's Dockerfile begins with another stage or a variable, so that nothing "
                "says which base its layers belong on. Name an image after FROM there, or give an image by --base.",
                reason="TEMPLATE_UNSUPPORTED",
            )
    own = (each for each in named if each and not _BENTOMLS.fullmatch(each))
    return next((f"{_REGISTRY}{each.removeprefix(_REGISTRY)}" for each in own), "")


def _host(location: Location) -> str:
    return location.host.lower().removesuffix(":443")


@asynccontextmanager
async def opened(
    name: str,
    platforms: Sequence[Platform],
    cache: Path,
    *,
    refresh: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[list[BaseImage]]:
    """The base that `name` stands for, for each platform: what it stood for before, unless `refresh`.

    Raises:
        NotFound: there is no such image (IMAGE_NOT_FOUND), or what it stood for is gone (BASE_GONE).
        EkibenError: see `open_images`.
    """
    folder = cache / "bases"
    async with open_images(name, say) as (store, reference):
        # A layout on disk changes only when its owner has it changed.
        moves = name.startswith("docker:") and not _DIGEST.search(reference)

        async def find(platform: Platform) -> BaseImage:
            key = f"{name} {platform}"
            pinned = (await asyncio.to_thread(_pins, folder)).get(key) if moves and not refresh else None
            try:
                what = Descriptor.from_json(pinned) if pinned else reference
                base = await open_base(store, what, name, platform, folder)
            except NotFound as error:
                if not pinned:
                    raise
                raise NotFound(
                    f"{name} stood for {pinned['digest']}, which is not there any more. To take what it stands for "
                    "now, give --refresh-base.",
                    reason="BASE_GONE",
                    image=name,
                ) from error
            if moves and not pinned:
                await asyncio.to_thread(_pin, folder, key, replace(base.descriptor, annotations={}).to_json())
            return base

        async def twin() -> BaseImage | None:
            with contextlib.suppress(EkibenError):  # many bases are for one platform only
                return await find(here())
            return None

        found = [await find(platform) for platform in platforms]
        yield [
            base
            if (base.image.config.get("os"), base.image.config.get("architecture")) == (here().os, here().architecture)
            else replace(base, twin=twin)
            for base in found
        ]


def _pins(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "pins.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _pin(folder: Path, key: str, descriptor: Mapping[str, Any]) -> None:
    make_folder(folder)
    with _alone(folder):
        pins = {**_pins(folder), key: descriptor}
        write_whole(folder / "pins.json", json.dumps(pins, indent=1, sort_keys=True).encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".pins.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
