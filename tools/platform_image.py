"""The platform's own image, made by its own builder: `python tools/platform_image.py --output docker://HOST/ekiben`.

    base (by name) · users and folders · what requirements.lock pins · Ekiben itself

No engine and no Dockerfile: the layers are assembled as those of a bento are, so equal sources on an equal base give an
equal digest on every machine. It prints that digest.
"""

import argparse
import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from email.parser import Parser
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from uv import find_uv_bin

from ekiben.errors import EkibenError
from services.builder import base_rules, compilers, environment_layers, images
from services.builder.assembler import Assembler
from services.builder.bases import BaseImage
from services.builder.bytecode import Bytecode, Compiler
from services.builder.compression import Rules
from services.builder.image_environments import ImageEnvironments
from services.builder.images import VENV
from services.builder.interpreters import Interpreters
from services.builder.layers import Entry, entries_of
from services.builder.locks import Locks, Work
from services.builder.platforms import here
from services.builder.recipe import Recipe
from services.builder.requirements import Requirement as Locked
from services.builder.requirements import parse
from services.builder.settings import Settings
from services.builder.targets import Target
from services.builder.uv import Programs
from services.content import open_images
from services.content.digest import Digest
from services.content.images import INDEX, MANIFEST, Descriptor, ImageStore, Platform, canonical
from services.kernel.clock import SYSTEM

ROOT = Path(__file__).resolve().parent.parent
USER = 10001
"""Above what distributions give to their own."""
DATA = "/var/lib/ekiben"
_LAUNCHER = f"#!{VENV}/bin/python -P\nfrom ekiben.launch import command\ncommand()\n"


def say(text: str) -> None:
    """Tell whoever watches."""
    print(text, file=sys.stderr, flush=True)


def wheel_for(platform: Platform, folder: Path) -> Path:
    """The distribution's wheel, with the compiled capture filter where that is for this machine's platform.

    By way of a source distribution, which is unpacked elsewhere: a wheel's build replaces the checkout's own filter.
    """
    into = folder / platform.architecture
    env = os.environ | {} if platform == here() else os.environ | {"EKIBEN_BUILD_WITHOUT_C": "1"}
    subprocess.run([find_uv_bin(), "build", "--quiet", "--out-dir", into, ROOT], check=True, env=env)
    (wheel,) = into.glob("*.whl")
    return wheel


def recipe_of(metadata: str, lock: str, python: str) -> Recipe:
    """What the wheel needs, in the versions and with the hashes of requirements.lock."""
    needed = [Requirement(each) for each in Parser().parsestr(metadata).get_all("Requires-Dist", [])]
    locked = [line for line in parse(lock) if isinstance(line, Locked)]
    return Recipe(
        python=python,
        bentoml_version="",
        requirements=tuple(str(each) for each in needed if "extra" not in str(each.marker or "")),
        constraints=tuple(each.text for each in locked),
        hashes={each.name: each.hashes for each in locked if each.name and each.hashes},
    )


def users(base: BaseImage) -> Iterator[Entry]:
    """The user `ekiben` and the folder that is its own."""
    lines = {"etc/passwd": f"ekiben:x:{USER}:{USER}:Ekiben:{DATA}:/bin/sh\n", "etc/group": f"ekiben:x:{USER}:\n"}
    usual = {"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n"}
    for name, line in lines.items():
        text = base.about.files.get(name) or usual[name]
        yield Entry(name, data=f"{text.rstrip()}\n{line}".encode())
    yield Entry(DATA.strip("/"), owner=USER)


def suite(unpacked: Path, minor: str, compiler: Compiler | None, bytecode: Bytecode) -> Iterator[Entry]:
    """Ekiben's own modules beside those that it needs."""
    at = f"{VENV.strip('/')}/lib/python{minor}/site-packages"
    yield from entries_of(unpacked, at)
    for compiled in bytecode.of(unpacked, compiler) if compiler else ():
        yield Entry(f"{at}/{compiled.name}", path=compiled.path)
    yield Entry(f"{VENV.strip('/')}/bin/ekiben", data=_LAUNCHER.encode(), executable=True)


def configuration_of(base: BaseImage, version: str) -> dict[str, Any]:
    """The member `config`: `ekiben up` for everybody who reaches the container, its data in the one folder."""
    below = base.image.config.get("config") or {}
    envs = dict(each.split("=", 1) for each in below.get("Env") or () if "=" in each)
    envs["PATH"] = f"{VENV}/bin:" + envs.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    return {
        "User": str(USER),
        "WorkingDir": DATA,
        "Env": [f"{name}={value}" for name, value in {**envs, "EKIBEN_DATA": DATA, "PYTHONUNBUFFERED": "1"}.items()],
        "Entrypoint": ["ekiben"],
        "Cmd": ["up", "--host", "0.0.0.0"],
        "ExposedPorts": {"7400/tcp": {}},
        "Labels": annotations_of(base, version),
    }


def annotations_of(base: BaseImage, version: str) -> dict[str, str]:
    """What the image says of itself."""
    found = {
        "org.opencontainers.image.title": "ekiben",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": base.reference,
        "org.opencontainers.image.base.digest": str(base.descriptor.digest),
    }
    return {key: value for key, value in found.items() if value}


async def _image(base: BaseImage, python: str, cache: Path, work: Path, programs: Programs, into: ImageStore) -> bytes:
    """The manifest for one platform; all that it names is in `into`."""
    platform = images.platform_of(base.image)
    wheel = await asyncio.to_thread(wheel_for, platform, work)
    version, unpacked = wheel.name.split("-")[1], work / f"wheel-{platform.architecture}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    recipe = recipe_of(metadata.read_text(), (ROOT / "requirements.lock").read_text(), python)
    found = base.about.python(python, base.name)
    target = Target(platform, found.version, base.about.libc)
    say(f"Base image {base.name} ({base.descriptor.digest}): {target} at {found.path}.")
    environments = ImageEnvironments(cache, programs, Locks(cache, programs))
    environment = await environments.make(recipe, target, unpacked, Work(work, say))
    settings = Settings(database_url="sqlite://", data_dir=cache)
    compiler = await compilers.find(base, found, cache, Interpreters(programs, settings, SYSTEM), say)
    assembler, bytecode = Assembler(cache, say, Rules.parse("").of(into.name)), Bytecode(cache)
    for layer in base.image.layers:
        if await into.size(layer.digest) != layer.size_bytes:
            await into.write(base.store.read(layer), layer)
    layers = [
        await assembler.layer(into, f"platform users {base.descriptor.digest}", "the user ekiben", lambda: users(base)),
        await assembler.layer(
            into,
            environment_layers.key_of(environment, found.path, compiler),
            f"Python environment {environment.digest[:19]}",
            lambda: environment_layers.entries(environment, found.path, compiler, bytecode),
        ),
        await assembler.layer(
            into,
            f"platform {hashlib.sha256(wheel.read_bytes()).hexdigest()} {found.minor} {compiler}",
            f"Ekiben {version}",
            lambda: suite(unpacked, found.minor, compiler, bytecode),
        ),
    ]
    below = base.image.config
    config = canonical(
        {
            **{key: below[key] for key in ("architecture", "os", "variant") if below.get(key)},
            "config": configuration_of(base, version),
            "rootfs": {
                "type": "layers",
                "diff_ids": [*below["rootfs"]["diff_ids"], *(str(layer.diff_id) for layer in layers)],
            },
            "history": images.history_of(base.image, layers),
        }
    )
    digest, size_bytes = await into.write(_one(config))
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": images.config_descriptor(digest, size_bytes).to_json(),
            "layers": [each.to_json() for each in [*base.image.layers, *(layer.descriptor for layer in layers)]],
            "annotations": annotations_of(base, version),
        }
    )


async def _one(chunk: bytes) -> Any:
    yield chunk


async def build(*, base: str, output: str, python: str, platforms: Sequence[Platform], cache: Path) -> Descriptor:
    """Make the image, or an index of images for several platforms; what names it in the output.

    A crash leaves blobs that nothing names, which the next run uses.

    Raises:
        EkibenError: base or output cannot be used, or a package cannot be had for the base.
    """
    name = (base or base_rules.USUAL).replace("{python}", python)
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="ekp") as run_dir, tempfile.TemporaryDirectory(dir=cache) as work:
        programs = Programs(cache, Path(run_dir))
        async with base_rules.opened(name, platforms, cache) as bases, open_images(output) as (into, named):
            made = []
            for each in bases:
                found = replace(each, ours=True)
                made.append((await _image(found, python, cache, Path(work), programs, into), found))
            reference = named or "latest"
            if len(made) == 1:
                return await into.tag(reference, made[0][0], MANIFEST, images.platform_of(made[0][1].image))
            parts = []
            for manifest, found in made:
                await into.keep(manifest, MANIFEST)
                parts.append(
                    Descriptor(
                        MANIFEST,
                        Digest(hashlib.sha256(manifest).hexdigest()),
                        len(manifest),
                        platform=images.platform_of(found.image),
                    )
                )
            return await into.tag(reference, images.index_of(parts), INDEX, None)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the platform's own image.")
    parser.add_argument("--output", required=True, help="docker://HOST/NAME:TAG, oci:FOLDER:TAG or docker-archive:FILE")
    parser.add_argument("--base", default="", help=f"image to put it on (default: {base_rules.USUAL})")
    parser.add_argument("--python", default="3.11", help="minor version of the base's Python (default: %(default)s)")
    parser.add_argument("--platform", default="", help="linux/amd64,linux/arm64 (default: this machine's)")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ekiben/images").expanduser())
    given = parser.parse_args()
    platforms = [Platform.parse(each) for each in dict.fromkeys(given.platform.split(",")) if each] or [here()]
    try:
        made = asyncio.run(
            build(
                base=given.base,
                output=given.output,
                python=given.python,
                platforms=platforms,
                cache=given.cache.absolute(),
            )
        )
    except EkibenError as exc:
        print(f"Error: {exc.message}", file=sys.stderr)
        return 1
    print(made.digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
