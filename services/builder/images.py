"""The image of a bento: which layers on which base, and what its configuration says. Pure.

A command line, port or variable that is meant for the image which BentoML builds of the same bento works here too: the
same paths, user, entry point and variables. Source: BentoML 1.4's base_v2 Dockerfile template.
"""

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekiben.errors import FailedPrecondition
from services.content.digest import Digest
from services.content.images import CONFIG, INDEX, MANIFEST, Descriptor, Image, Platform, canonical

BENTO_PATH = "/home/bentoml/bento"
HOME = "/home/bentoml"
VENV = "/app/.venv"
ENTRYPOINT = f"{BENTO_PATH}/env/docker/entrypoint.sh"
PORTS = ("3000/tcp", "3001/tcp")
MODEL = "dev.ekiben.model"
"""Annotation in an index of what is mounted into the image that the index is of: the model's tag."""
NOWHERE = Platform("unknown", "unknown")
"""What such an entry runs on, so that no engine takes it for the image; as BuildKit does for its attestations."""
EVERY_BENTO = re.compile(
    r"apt-get update && apt-get install -q -y --no-install-recommends --allow-remove-essential\s+"
    r"ca-certificates gnupg2 bash build-essential( git)?"
)
_HUB_CACHE, _HUB_FOLDER = "BENTOML_HF_CACHE_DIR", f"{BENTO_PATH}/hf-models"


@dataclass(frozen=True)
class Layer:
    """A layer of ours as it lies in the store."""

    descriptor: Descriptor
    diff_id: Digest
    """Digest of the tar, whatever the descriptor's content is compressed with."""
    created_by: str
    """In words, for `podman history`."""


@dataclass(frozen=True)
class Names:
    """What the image says of itself."""

    bento: str
    bentoml_version: str
    models: tuple[str, ...] = ()
    base: str = ""
    base_digest: str = ""
    environment: str = ""
    """Digest of the Python environment."""


def configuration_of(base: Image, envs: Mapping[str, str]) -> dict[str, Any]:
    """The member `config` of a bento's image on a base."""
    below = base.config.get("config") or {}
    return {
        **{key: value for key, value in below.items() if key not in ("Cmd", "Entrypoint", "Healthcheck")},
        "User": "bentoml",
        "WorkingDir": BENTO_PATH,
        "Entrypoint": [ENTRYPOINT],
        "ExposedPorts": {port: {} for port in PORTS},
        "Env": _environment(below.get("Env") or [], envs),
    }


def image_of(
    base: Image, layers: Sequence[Layer], names: Names, configuration: Mapping[str, Any]
) -> tuple[bytes, Image]:
    """The configuration's bytes, and the image: the base's layers below ours."""
    annotations = annotations_of(names)
    config: dict[str, Any] = {
        "architecture": base.config["architecture"],
        "os": base.config["os"],
        **({"variant": base.config["variant"]} if base.config.get("variant") else {}),
        "config": {**configuration, "Labels": {**(configuration.get("Labels") or {}), **annotations}},
        "rootfs": {
            "type": "layers",
            "diff_ids": [*base.config["rootfs"]["diff_ids"], *(str(layer.diff_id) for layer in layers)],
        },
        "history": history_of(base, layers),
    }
    descriptors = [*base.layers, *(layer.descriptor for layer in layers)]
    return canonical(config), Image(config, descriptors, annotations)


def history_of(base: Image, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """The base's history, then ours. One that does not tell of each layer is filled up: buildah and podman build
    nothing on an image whose history has fewer or more layers than the image."""
    history = [dict(each) for each in base.config.get("history") or []]
    told = sum(1 for each in history if not each.get("empty_layer"))
    missing = len(base.config["rootfs"]["diff_ids"]) - told
    if missing < 0:
        history, missing = [], missing + told
    return [
        *({"created_by": "base image"} for _ in range(missing)),
        *history,
        *({"created_by": layer.created_by, "comment": "ekiben"} for layer in layers),
    ]


def manifest_of(image: Image, config: Descriptor) -> bytes:
    """The manifest's bytes."""
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in image.layers],
            **({"annotations": dict(image.annotations)} if image.annotations else {}),
        }
    )


def index_of(manifests: Sequence[Descriptor]) -> bytes:
    """The bytes of an index of one image for several platforms, in the same order whoever asked for them."""
    listed = sorted((each.to_json() for each in manifests), key=lambda each: str(each["platform"]))
    return canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed})


def model_of(layer: Layer, platform: Platform) -> tuple[bytes, Callable[[Descriptor], bytes]]:
    """The configuration of an image that has a model's layer and runs nothing; and its manifest, by what names that.

    Engines unpack only layers of images for their own platform, so there is one for each: the layer is the same.
    """
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        **({"variant": platform.variant} if platform.variant else {}),
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id)]},
        "history": [{"created_by": layer.created_by, "comment": "ekiben"}],
    }

    def manifest(named: Descriptor) -> bytes:
        return manifest_of(Image(config, [layer.descriptor]), named)

    return canonical(config), manifest


def config_descriptor(digest: Digest, size_bytes: int) -> Descriptor:
    """What names a configuration in a manifest."""
    return Descriptor(CONFIG, digest, size_bytes)


def platform_of(image: Image) -> Platform:
    """What an image runs on."""
    config = image.config
    return Platform(str(config["os"]), str(config["architecture"]), str(config.get("variant") or ""))


def annotations_of(names: Names) -> dict[str, str]:
    """Annotations of the manifest, and labels of the configuration."""
    found = {
        "org.opencontainers.image.title": names.bento,
        "org.opencontainers.image.base.name": names.base,
        "org.opencontainers.image.base.digest": names.base_digest,
        "dev.ekiben.bento": names.bento,
        "dev.ekiben.models": ",".join(names.models),
        "dev.ekiben.environment": names.environment,
        "dev.ekiben.bentoml-version": names.bentoml_version,
    }
    return {key: value for key, value in found.items() if value}


def envs_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The variables that a bento gives its image: all but those for the build only, and those without a value.

    Raises:
        FailedPrecondition: one that no container can have, or what is no list of them (BENTO_INCOMPLETE).
    """
    envs, docker = manifest.get("envs") or [], manifest.get("docker")
    old = docker.get("env") if isinstance(docker, Mapping) else None
    found = {str(key): str(value) for key, value in old.items()} if isinstance(old, Mapping) else {}
    if not isinstance(envs, list):
        raise _unusable(f"bento.yaml has {str(envs)[:50]!r} for envs, where a list belongs")
    for each in envs:
        if not isinstance(each, Mapping) or not each.get("name"):
            raise _unusable(f"bento.yaml has {str(each)[:50]!r} among its envs, which is no variable with a name")
        if each.get("stage", "all") != "build" and each.get("value") not in (None, ""):
            found[str(each["name"])] = str(each["value"])
    for name, value in found.items():
        if not name or re.search(r"[=\0]", name):
            raise _unusable(f"it has a variable {name[:80]!r}, and nothing can be given one of that name")
        if "\0" in value:
            raise _unusable(f"its variable {name} has a NUL in its value, which no variable can hold")
    return found


def _unusable(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The bento cannot be built: {what}. Correct its envs and build the bento again.", reason="BENTO_INCOMPLETE"
    )


def without_hub(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an image whose models of Hugging Face are fetched when it starts.

    BentoML looks for them where its own images have them: a folder that is empty in ours and, where the root is
    read-only, stays so. Without the variable they go where that hub's own cache is, below HOME.
    """
    envs = [each for each in configuration.get("Env") or () if each != f"{_HUB_CACHE}={_HUB_FOLDER}"]
    return {**configuration, "Env": envs}


def commands_of(manifest: Mapping[str, Any]) -> list[str]:
    """What must run while the image is built. Not what every bento has: BentoML installs a compiler and git whether
    they are used or not, for packages without wheels, which the environment is not made from."""
    image, docker = manifest.get("image"), manifest.get("docker")
    found: list[str] = []
    if isinstance(image, Mapping):
        for key in ("commands", "post_commands"):
            found += [str(each).strip() for each in image.get(key) or ()]
    if isinstance(docker, Mapping):
        for key in ("system_packages", "setup_script", "dockerfile_template", "cuda_version"):
            found += [f"{key}: {docker[key]}"] if docker.get(key) else []
        if not isinstance(image, Mapping) and asks_for_system(docker):
            found.append(f"distro: {docker.get('distro')}")
    return [each for each in found if not EVERY_BENTO.fullmatch(each)]


def asks_for_system(docker: Mapping[str, Any]) -> bool:
    """Whether a bento before 1.4 asks for another system than BentoML's usual one, by its distribution or CUDA."""
    if docker.get("base_image"):
        return False  # the other two are ignored then
    return bool(docker.get("cuda_version")) or str(docker.get("distro") or "debian") != "debian"


def with_venv(path: str) -> str:
    """A PATH of the bento's own, with the environment first: BentoML's images put it there after the bento's value."""
    own = posixpath.join(VENV, "bin")
    return path if path.split(":")[0] == own else f"{own}:{path}"


def _environment(base: Sequence[str], envs: Mapping[str, str]) -> list[str]:
    found = dict(each.split("=", 1) for each in base if "=" in each)
    path = found.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    found |= {
        "PATH": f"{posixpath.join(VENV, 'bin')}:{path}",
        "VIRTUAL_ENV": VENV,
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "PYTHONIOENCODING": "UTF-8",
        "PYTHONUNBUFFERED": "1",
        "HOME": HOME,
        "BENTO_PATH": BENTO_PATH,
        "BENTOML_HOME": f"{HOME}/",
        _HUB_CACHE: _HUB_FOLDER,
        "BENTOML_CONTAINERIZED": "true",
        **envs,
    }
    if "PATH" in envs:
        found["PATH"] = with_venv(envs["PATH"])
    return [f"{key}={value}" for key, value in found.items()]
