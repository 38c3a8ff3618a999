"""Reading an unpacked bento: what `recipe` needs of it."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ekiben.errors import FailedPrecondition
from services.builder.recipe import BentoFiles
from services.builder.requirements import logical_lines, parse_option

_MOST_BYTES = 32 << 20
"""Of bento.yaml or a requirements file; a bento.yaml carries its schema, some hundred kilobytes at most."""
_NODE_BYTES = 64
"""What every value counts besides its characters: there may be half a million."""
_MOST_DEPTH = 100
_LISTS = {
    "image": ("commands", "post_commands", "build_include"),
    "docker": ("system_packages",),
    "python": ("index_url", "extra_index_url", "find_links", "trusted_host"),
}
"""What is gone through, part by part, wherever it is read."""
_MOST_FILES = 10
"""Of requirements that name one another."""
_NAMES_FILES = re.compile(r"(?m)^\s*(-[rc]|--requirement|--constraint)")
_ARCHIVES = (".whl", ".tar.gz", ".zip", ".tgz")
_PROJECT = ("pyproject.toml", "setup.py")


def read(bento: Path) -> BentoFiles:
    """What the recipe needs. Blocks.

    Raises:
        FailedPrecondition: there is no readable bento.yaml (BENTO_INCOMPLETE).
    """
    python = bento / "env" / "python"
    try:
        manifest = yaml.load(_text(bento / "bento.yaml"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise _incomplete(f"bento.yaml cannot be read: {exc}") from exc
    if not isinstance(manifest, dict):
        raise _incomplete("bento.yaml holds no mapping")
    if not _is_small(manifest):
        raise _incomplete("bento.yaml says more than can be read, or refers to itself")
    _check_lists(manifest)
    # The image of a bento installs requirements.lock.txt where an older client wrote one.
    lock, plain = python / "requirements.lock.txt", python / "requirements.txt"
    constraints: list[str] = []
    try:
        requirements = _text(lock) if lock.is_file() else _text(plain) if plain.is_file() else _inline(manifest)
        if _NAMES_FILES.search(requirements):
            requirements = "\n".join(_with_files(requirements, python, bento, constraints))
        version = _text(python / "version.txt") if (python / "version.txt").is_file() else ""
    except (OSError, ValueError) as exc:
        raise _incomplete(f"its requirements cannot be read: {exc}") from exc
    docker = bento / "env" / "docker"
    try:
        dockerfile = _text(docker / "Dockerfile") if (docker / "Dockerfile").is_file() else ""
    except (OSError, ValueError) as exc:
        raise _incomplete(f"its Dockerfile cannot be read: {exc}") from exc
    scripts = sorted(path.name for path in docker.glob("*") if path.name.startswith(("script__", "setup_script")))
    shipped = _shipped(bento)
    limits = "\n".join(constraints)
    return BentoFiles(
        manifest, requirements, version, shipped, tuple(scripts), dockerfile, limits, has_python=python.is_dir()
    )


def _with_files(
    text: str, at: Path, bento: Path, constraints: list[str], above: tuple[Path, ...] = ()
) -> Iterator[str]:
    """The lines of a requirements file, with those of the files that it names by `-r`; those of `-c` are added to
    `constraints`. A line whose file is not in the bento stays.

    Files are looked for beside the one that names them, then where a bento's image runs the installer.
    """
    for line in logical_lines(text):
        option = parse_option(line) if line.startswith("-") else None
        named = option.value if option is not None and option.name in ("--requirement", "--constraint") else ""
        found = [_inside(folder / named, bento) for folder in (at, bento / "src", bento / "env" / "python")]
        path = next((each for each in found if each is not None and each.is_file()), None) if named else None
        if option is None or path is None or path in above or len(above) > _MOST_FILES:
            yield line
            continue
        lines = _with_files(_text(path), path.parent, bento, constraints, (*above, path))
        if option.name == "--requirement":
            yield from lines
        else:
            constraints += lines


def _inside(path: Path, bento: Path) -> Path | None:
    """Where a path of a bento leads to, if that is in the bento."""
    real = Path(os.path.realpath(path))
    return real if real.is_relative_to(os.path.realpath(bento)) else None


def _check_lists(manifest: dict[str, Any]) -> None:
    for section, keys in _LISTS.items():
        said = manifest.get(section)
        for key in keys:
            value = said.get(key) if isinstance(said, dict) else None
            words = isinstance(value, str) and section != "image"  # there each letter would be a command
            if value and not words and not isinstance(value, list | tuple):
                raise _incomplete(f"bento.yaml has {str(value)[:50]!r} for {section}.{key}, where a list belongs")


def _is_small(value: Any) -> bool:
    """Whether nothing in there is much longer when it is written out: aliases of YAML may stand for ever more."""
    left, waiting = _MOST_BYTES, [(value, 0)]
    while waiting:
        each, depth = waiting.pop()
        left -= _NODE_BYTES + (len(each) if isinstance(each, str | bytes) else 0)
        if left < 0 or depth > _MOST_DEPTH:
            return False
        if isinstance(each, dict):
            waiting += [(part, depth + 1) for pair in each.items() for part in pair]
        elif isinstance(each, list | tuple | set):
            waiting += [(part, depth + 1) for part in each]
    return True


def _inline(manifest: dict[str, Any]) -> str:
    image = manifest.get("image")
    return str(image.get("python_requirements") or "") if isinstance(image, dict) else ""


def _shipped(bento: Path) -> dict[str, str]:
    """Archives that may be installed, and source folders that may be built, by path: each with its digest."""
    found = {}
    for root in ("src", "env/python"):
        for folder, folders, names in os.walk(bento / root):
            here = Path(folder)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                path = _inside(here / name, bento) if name.endswith(_ARCHIVES) else None
                if path is not None and path.is_file():
                    found[str((here / name).relative_to(bento))] = _digest_of_file(here / name)
            if any(name in names for name in _PROJECT):
                found[str(here.relative_to(bento))] = _digest_of_folder(here, bento)
    return found


def copy_folder(folder: Path, into: Path, bento: Path) -> None:
    """Copy a source folder of a bento: what its digest in `BentoFiles.shipped` is of. Blocks."""
    into.mkdir()
    for path in _files_of(folder, bento):
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _files_of(folder: Path, bento: Path, above: tuple[str, ...] = (), *, linked: bool = False) -> Iterator[Path]:
    """The files of a source folder. Links are followed as far as they stay in the bento; one to a folder leads to no
    folder above itself, nor to others by more links."""
    above = (*above, os.path.realpath(folder))
    for path in folder.iterdir():
        real = _inside(path, bento)
        if real is None or (path.is_symlink() and linked and real.is_dir()):
            continue
        if real.is_file():
            yield path
        elif real.is_dir() and str(real) not in above:
            yield from _files_of(path, bento, above, linked=linked or path.is_symlink())


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_folder(folder: Path, bento: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(_files_of(folder, bento)):
        digest.update(f"{path.relative_to(folder)}\0{_digest_of_file(path)}\n".encode())
    return digest.hexdigest()


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {_MOST_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8-sig")


def _incomplete(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"The bento cannot be built: {what}.", reason="BENTO_INCOMPLETE")
