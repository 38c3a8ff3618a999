"""`python -m services.builder.offline`: an image of a bento on this machine's disk, without any server.

`ekiben images build` calls it. What it makes is the builder's: the same locks, environments and layers, in a cache
folder of the user.
"""

import argparse
import asyncio
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ekiben import archives, localstore
from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument
from services.builder import bento as bentos
from services.builder import image_builds, offline_caches, stopping
from services.builder.assembler import Model
from services.builder.attesting import Attestor
from services.builder.buildah import BuildahEngine
from services.builder.commands import secrets_of
from services.builder.compression import Rules
from services.builder.engine import Secret
from services.builder.image_builds import Source, Workshop
from services.builder.image_environments import ImageEnvironments
from services.builder.interpreters import Interpreters
from services.builder.locks import Locks, Work
from services.builder.platforms import here
from services.builder.recipe import make_recipe
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.content import open_images
from services.content.archives import unpack_archive
from services.content.attestations import keys
from services.content.attestations.keys import Private
from services.content.images import Descriptor, Platform
from services.kernel.clock import SYSTEM

_TAG = re.compile(r"[A-Za-z0-9_][-._A-Za-z0-9]{0,127}")
_REFERENCE = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+]|--|/)[A-Za-z0-9]+)*")
"""Source: OCI image-spec 1.1, annotations.md, `org.opencontainers.image.ref.name`."""


async def build(
    bento: str,
    *,
    base: str,
    output: str,
    cache: Path,
    reference: str = "",
    platforms: Sequence[Platform] = (),
    compression: str = "",
    attest: bool = True,
    key: Private | None = None,
    refresh_commands: bool = False,
    refresh_base: bool = False,
    from_source: Sequence[str] = (),
) -> Descriptor:
    """Build the image of a bento, by its tag in the local store or its folder; what names it in the output.

    For this machine's platform where none is named. With a key it is signed, and what is said of it too.

    Raises:
        EkibenError: it cannot be built; reasons are those of builds, of `image_builds.build_image` and of
            `offline_caches.used`.
    """
    folder = Path(bento) if Path(bento, "bento.yaml").is_file() else localstore.folder("bentos", bento)
    named = localstore.read_bento(folder)
    models = named.models
    _check_names(named, output)
    await asyncio.to_thread(_check_layout, output)
    settings = Settings(database_url="sqlite://", data_dir=cache)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(offline_caches.used(cache, _say))
        run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="ekb"))
        tmp = stack.enter_context(tempfile.TemporaryDirectory(dir=_made(cache / "tmp")))
        folder = await asyncio.to_thread(_as_pushed, folder, Path(tmp))
        files = await asyncio.to_thread(bentos.read, folder)
        programs = Programs(cache, Path(run_dir))
        locks = Locks(cache, programs)
        engine = BuildahEngine(cache / "engine", programs, timeout_s=settings.build_timeout_s)
        await engine.sweep()
        image_builds.check(files, engine, platforms)
        recipe = make_recipe(files)
        for note in recipe.notes:
            if note not in recipe.skipped:
                _say(note)
        interpreters = Interpreters(programs, settings, SYSTEM)
        attestor = Attestor(cache, key=key) if attest else None
        workshop = Workshop(cache, ImageEnvironments(cache, programs, locks), interpreters, engine, attestor)
        source = Source(
            folder,
            files,
            recipe,
            [_model(each) for each in models],
            [Secret(name, os.environ[name]) for name in secrets_of(files.manifest) if name in os.environ],
            refresh_commands,
            from_source,
        )
        async with open_images(output, _say) as (into, tag):
            return await image_builds.build_image(
                source,
                platforms or [here()],
                base=base,
                into=into,
                reference=reference or tag or source.tag.partition(":")[2],
                workshop=workshop,
                work=Work(Path(tmp), _say),
                compression=Rules.parse(compression).of(output),
                refresh_base=refresh_base,
            )


def _as_pushed(bento: Path, work: Path) -> Path:
    """The bento as a builder of the platform has it: a push puts what links lead to in their place, so that an image
    that is made here has the digest of one that is made there.

    Raises:
        EkibenError: it could not be pushed: a link leads nowhere (FILE_NOT_READABLE), or to a folder above itself
            (LINK_LOOP).
    """
    if not _has_links(bento):
        return bento
    pushed, into = work / "bento.tar", work / "bento"
    with pushed.open("wb") as file:
        for chunk in localstore.read_bento(bento).archive.chunks():
            file.write(chunk)
    unpack_archive(pushed, into)
    pushed.unlink()
    return into


def _has_links(bento: Path) -> bool:
    for top, folders, names in os.walk(bento):
        if Path(top) == bento:
            folders[:] = [name for name in folders if name != "models"]
        if any(Path(top, name).is_symlink() for name in (*folders, *names)):
            return True
    return False


def _model(tag: str) -> Model:
    folder = localstore.folder("models", tag)
    repository, version = folder.parent.name, folder.name
    return Model(
        f"{repository}:{version}",
        archives.of_folder(folder).fingerprint(),
        lambda: contextlib.nullcontext(folder),
    )


def _check_names(bento: localstore.Version, output: str) -> None:
    """Refuse what no image can be named by, before anything is made for it."""
    if re.fullmatch(r"[a-z0-9][-._a-z0-9]{0,127}", bento.repository) is None or _TAG.fullmatch(bento.version) is None:
        raise FailedPrecondition(
            f"The bento cannot be built: its bento.yaml names it {bento.tag[:200]!r}, and a name or version has "
            "letters, digits, dots, hyphens and underscores only. Correct it, or build the bento again.",
            reason="BENTO_INCOMPLETE",
        )
    transport, _, rest = output.partition(":")
    if transport == "oci" and (reference := rest.partition(":")[2]) and _REFERENCE.fullmatch(reference) is None:
        raise InvalidArgument(
            f"The image {output!r} is refused: {reference!r} is no reference that others find it by. It has letters, "
            "digits and . _ - : @ / + between them.",
            reason="IMAGE_NAME_INVALID",
            image=output,
        )


def _check_layout(output: str) -> None:
    """Refuse a folder that cannot be one before anything is made for it."""
    transport, _, rest = output.partition(":")
    folder = Path(rest.partition(":")[0])
    if transport == "oci" and rest:
        above = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise FailedPrecondition(
                f"No layout can be kept in {folder}: {above} is no folder that is yours to write to.",
                reason="OUTPUT_NOT_WRITABLE",
                path=str(folder),
            )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; prints the image's digest."""
    parser = argparse.ArgumentParser(prog="python -m services.builder.offline")
    parser.add_argument("bento")
    parser.add_argument("--base", default="")
    parser.add_argument("--refresh-base", action="store_true")
    parser.add_argument("--from-source", action="append", default=[])
    parser.add_argument("--output", required=True)
    parser.add_argument("--tag", default="")
    parser.add_argument("--compression", default="")
    parser.add_argument("--platform", default="")
    parser.add_argument("--no-attestations", action="store_true")
    parser.add_argument("--sign-key", type=Path)
    parser.add_argument("--password-file", type=Path)
    parser.add_argument("--refresh-commands", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ekiben/images").expanduser())
    given = parser.parse_args(arguments)
    cache = given.cache.absolute()

    async def work() -> Descriptor:
        return await build(
            given.bento,
            base=given.base,
            output=given.output,
            cache=cache,
            reference=given.tag,
            compression=given.compression,
            refresh_commands=given.refresh_commands,
            refresh_base=given.refresh_base,
            from_source=given.from_source,
            platforms=[Platform.parse(each) for each in dict.fromkeys(given.platform.split(",")) if each],
            attest=key is not None or not given.no_attestations,
            key=key,
        )

    try:
        key = keys.load_private(given.sign_key, given.password_file) if given.sign_key else None
        found = stopping.run(work())
    except stopping.Stopped:
        print("Stopped. Nothing was tagged; what was made so far is used by the next build.", file=sys.stderr)
        return stopping.STATUS
    except EkibenError as exc:
        print(f"Error: {exc.message}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"Error: {exc}. Nothing was tagged; what was made so far is used by the next build.", file=sys.stderr)
        return 1
    print(found.digest, flush=True)  # whoever waits for it need not wait for what follows
    asyncio.run(offline_caches.prune_daily(cache, _say))
    return 0


if __name__ == "__main__":
    sys.exit(main())
