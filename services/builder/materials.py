"""What an image was made of, as its bill of material and its provenance tell it."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from services.content.digest import Digest
from services.content.files import make_folder, touch, write_whole
from services.content.images import Descriptor, Platform


@dataclass(frozen=True)
class Material:
    """Something that went into an image: its name and the digest of what of it is in there."""

    name: str
    digest: Digest
    size_bytes: int = 0


@dataclass(frozen=True)
class Package:
    """A Python package as it is installed."""

    name: str
    """As PyPI spells it in addresses: lower case, hyphens."""
    version: str
    license: str = ""
    """An SPDX expression where the package gives one, else its own words."""
    spdx: bool = False
    summary: str = ""
    requires: tuple[str, ...] = ()
    """Names of installed packages that it needs."""
    hashes: tuple[str, ...] = ()
    """Hex SHA-256 of the files of which one was installed, from the lock."""


@dataclass(frozen=True)
class Materials:
    """An image for one platform, and everything in it."""

    image: Descriptor
    platform: Platform
    bento: Material
    """`repository:version`, and its layer."""
    base: Material
    models: Sequence[Material]
    environment_digest: str
    lock_digest: Digest
    packages: Sequence[Package]
    system: Sequence[str]
    """The base's packages, as package URLs."""
    python: str
    bentoml: str


def materials_of(
    image: Descriptor,
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    packages: Sequence[Package],
    system: Sequence[str],
    environment_digest: str,
    lock: str,
    python: str,
) -> Materials:
    """From an assembled image and the packages in it."""
    annotations = manifest.get("annotations") or {}
    layers = _layers(manifest, config)
    bento = str(annotations.get("dev.ekiben.bento") or "")
    base_digest = str(annotations.get("org.opencontainers.image.base.digest") or "")
    models = [tag for tag in str(annotations.get("dev.ekiben.models") or "").split(",") if tag]
    return Materials(
        image,
        Platform(str(config["os"]), str(config["architecture"]), str(config.get("variant") or "")),
        _material(bento, layers, f"bento {bento}", image),
        Material(str(annotations.get("org.opencontainers.image.base.name") or ""), Digest.parse(base_digest)),
        [_material(tag, layers, f"model {tag}", image) for tag in models],
        environment_digest,
        Digest(hashlib.sha256(lock.encode()).hexdigest()),
        packages,
        system,
        python,
        str(annotations.get("dev.ekiben.bentoml-version") or ""),
    )


def packages_of(environment: Path, digest: str, lock: str, remembered: Path) -> list[Package]:
    """The packages that are installed in an environment, by name, with the hashes that its lock has for each.

    Reads a file for each package, the first time; then what is remembered by the environment's digest.
    """
    known = remembered / f"{digest.removeprefix('sha256:')}.v1.json"
    touch(known)
    try:
        return [
            Package(**{key: _frozen(value) for key, value in each.items()}) for each in json.loads(known.read_text())
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        found = _read_packages(environment, lock)
    make_folder(remembered)
    write_whole(known, json.dumps([asdict(each) for each in found]).encode(), durable=False)
    return found


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read_packages(environment: Path, lock: str) -> list[Package]:
    hashes = dict(_hashes(lock))
    found = {_normal(str(each.metadata["Name"])): each for each in _installed(environment)}
    return [
        _package(name, distribution, found.keys(), hashes.get(name, ())) for name, distribution in sorted(found.items())
    ]


def _installed(environment: Path) -> Iterator[Distribution]:
    for folder in sorted(environment.glob("lib/python3*/site-packages")):
        context = DistributionFinder.Context(path=[str(folder)])
        for each in MetadataPathFinder.find_distributions(context):
            if each.metadata["Name"]:
                yield each


def _package(name: str, distribution: Distribution, installed: Any, hashes: tuple[str, ...]) -> Package:
    expression = _field(distribution, "License-Expression")
    words = _field(distribution, "License")
    if not expression and (not words or "\n" in words or len(words) > 80):  # some paste the whole text there
        named = [each for each in distribution.metadata.get_all("Classifier") or () if each.startswith("License :: ")]
        words = named[0].rpartition(" :: ")[2] if named else ""
    requires = set()
    for text in distribution.requires or ():
        try:
            required = _normal(Requirement(text).name)
        except InvalidRequirement:
            continue
        # Whether a marker asks for it here is seen from its being there.
        if required in installed and required != name:
            requires.add(required)
    return Package(
        name,
        distribution.version,
        expression or words,
        bool(expression),
        _field(distribution, "Summary"),
        tuple(sorted(requires)),
        hashes,
    )


def _field(distribution: Distribution, name: str) -> str:
    return str((distribution.metadata.get_all(name) or [""])[0]).strip()


def _hashes(lock: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of each pinned package of a requirements file: its name, and the hex digests after it."""
    name, found = "", list[str]()
    for line in lock.splitlines():
        text = line.strip().rstrip("\\").strip()
        if text.startswith("--hash=sha256:"):
            found.append(text.removeprefix("--hash=sha256:"))
        elif text and not text.startswith(("#", "-")) and not line.startswith((" ", "\t")):
            if name:
                yield name, tuple(sorted(found))
            name, found = _normal(text.split("==")[0].split("@")[0].split("[")[0].strip()), []
    if name:
        yield name, tuple(sorted(found))


def _layers(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Descriptor]:
    """Our layers by what the history says that they hold."""
    told = [each for each in config.get("history") or () if not each.get("empty_layer")]
    ours = [str(each.get("created_by")) for each in told if each.get("comment") == "ekiben"]
    descriptors = [Descriptor.from_json(each) for each in manifest["layers"]]
    return dict(zip(reversed(ours), reversed(descriptors), strict=False))


def _material(name: str, layers: Mapping[str, Descriptor], what: str, image: Descriptor) -> Material:
    layer = layers.get(what)
    return Material(name, layer.digest, layer.size_bytes) if layer is not None else Material(name, image.digest)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
