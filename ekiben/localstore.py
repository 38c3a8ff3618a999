"""The local BentoML store: `$BENTOML_HOME/{models,bentos}/NAME/VERSION`, read and written without importing bentoml.

A version is a folder with `model.yaml` or `bento.yaml` at its root; a text file `latest` beside the versions names the
newest one. What a push tells the platform about a version (its manifest) is what the `bentoml` command tells it.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ekiben.archives import Archive, of_file, of_folder
from ekiben.errors import FailedPrecondition, NotFound

_LARGEST_MANIFEST_FILE = 8 << 20
_NAME, _VERSION = r"[a-z0-9][-._a-z0-9]*", r"[A-Za-z0-9][-._A-Za-z0-9]*"
"""Nothing that leads out of the store, nor to all of it."""


@dataclass(frozen=True)
class Version:
    """A model or a bento as it lies on this machine."""

    repository: str
    version: str
    manifest: str
    """JSON text of an object."""
    archive: Archive
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    build_time: datetime | None = None
    models: tuple[str, ...] = ()
    """For a bento: the tags of the models that it names and that a store holds."""

    @property
    def tag(self) -> str:
        """`repository:version`."""
        return f"{self.repository}:{self.version}"


def home(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of the store: `$BENTOML_HOME`, or `~/bentoml`."""
    return Path(env.get("BENTOML_HOME") or "~/bentoml").expanduser()


def folder(kind: str, tag: str, *, root: Path | None = None) -> Path:
    """The folder of a version, `kind` being `models` or `bentos`; without a version, of the latest.

    Raises:
        NotFound: the store has no such version (NOT_IN_STORE).
    """
    base = (root or home()) / kind
    repository, _, version = tag.partition(":")
    if not version or version == "latest":
        try:
            version = (base / repository / "latest").read_text(encoding="utf-8").strip()
        except OSError:
            version = ""
    found = base / repository / version
    if not (re.fullmatch(_NAME, repository) and re.fullmatch(_VERSION, version) and found.is_dir()):
        raise NotFound(
            f"There is no {kind[:-1]} {tag!r} in {base}. `bentoml {'models ' * (kind == 'models')}list` shows them.",
            reason="NOT_IN_STORE",
            tag=tag,
        )
    return found


def target(kind: str, repository: str, version: str, *, root: Path | None = None) -> Path:
    """Where a version lies in the store, there or not."""
    return (root or home()) / kind / repository / version


def work(*, root: Path | None = None) -> Path:
    """A folder for what is not whole yet. Not among the versions: BentoML takes each folder there for one."""
    return (root or home()) / "tmp" / "ekiben"


def mark_latest(path: Path) -> None:
    """Say in the store that the version at `path` is the newest of its repository."""
    new = path.parent / f".latest.{os.getpid()}"
    new.write_text(path.name, encoding="utf-8")
    new.replace(path.parent / "latest")


def read_model(path: Path) -> Version:
    """A model as it lies in a folder, or in a tar file.

    Raises:
        FailedPrecondition: not a model (FOLDER_INVALID).
    """
    info, archive, size = _open(path, "model.yaml", lambda name: False)
    context = _mapping(info.get("context"))
    manifest = {
        "module": info.get("module") or "",
        "api_version": info.get("api_version") or "",
        "bentoml_version": context.get("bentoml_version") or "",
        "size_bytes": size,
        "metadata": _mapping(info.get("metadata")),
        "context": context,
        "options": _mapping(info.get("options")),
    }
    return Version(
        repository=str(info["name"]),
        version=str(info["version"]),
        manifest=_json(manifest),
        archive=archive,
        labels=_labels(info),
        build_time=_time(info.get("creation_time")),
    )


def read_bento(path: Path) -> Version:
    """A bento as it lies in a folder, or in a tar file. The models in it are left out: they are pushed as models.

    Raises:
        FailedPrecondition: not a bento (FOLDER_INVALID).
    """
    info, archive, size = _open(path, "bento.yaml", lambda name: name == "models" or name.startswith("models/"))
    services = [_mapping(item) for item in info.get("services") or []]
    if not isinstance(info.get("models") or [], list):
        raise FailedPrecondition(
            f"{path} is not a bento: its bento.yaml has {str(info['models'])[:50]!r} for models, where a list belongs.",
            reason="FOLDER_INVALID",
            path=str(path),
        )
    named = [_mapping(item) for item in info.get("models") or []]
    for service in services:
        named += [_mapping(item) for item in service.get("models") or []]
    models = {str(item["tag"]): str(item.get("registry") or "") for item in named if item.get("tag")}
    manifest = {
        "name": info["name"],
        "version": info["version"],
        "service": info.get("service") or "",
        "bentoml_version": info.get("bentoml_version") or "",
        "size_bytes": size,
        "entry_service": info.get("entry_service") or "",
        "apis": {},
        "models": list(models),
        "runners": [_runner(_mapping(item)) for item in info.get("runners") or []],
        "services": services,
        "envs": info.get("envs") or [],
        "schema": _mapping(info.get("schema")),
        "dev": False,
        "image": info.get("image"),
        "spec": info.get("spec") or 1,
    }
    return Version(
        repository=str(info["name"]),
        version=str(info["version"]),
        manifest=_json(manifest),
        archive=archive,
        labels=_labels(info),
        description=_readme(path),
        build_time=_time(info.get("creation_time")),
        models=tuple(tag for tag, registry in models.items() if registry != "huggingface"),
    )


def _open(path: Path, name: str, exclude: Callable[[str], bool]) -> tuple[dict[str, Any], Archive, int]:
    """The root manifest, the archive, and the size of the files in it."""
    import yaml  # here, because importing the client must stay light

    try:
        if path.is_dir():
            text = (path / name).read_bytes()
            archive = of_folder(path, exclude=exclude)
        else:
            archive = of_file(path)
            text = _from_tar(path, name)
        info = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(info, dict) or not info.get("name") or not info.get("version"):
            raise ValueError("it does not say a name and a version")
    except (OSError, ValueError, KeyError, tarfile.TarError, yaml.YAMLError) as error:
        said = f"it has no {name}" if isinstance(error, KeyError | FileNotFoundError) else str(error)
        hint = " Build it first: `bentoml build`." if (path / "service.py").is_file() else ""
        raise FailedPrecondition(
            f"{path} is not a {name.removesuffix('.yaml')}: {said}.{hint}", reason="FOLDER_INVALID", path=str(path)
        ) from error
    return info, archive, archive.size_bytes


def _from_tar(path: Path, name: str) -> bytes:
    with tarfile.open(path, mode="r:*") as tar:
        for member in tar:
            if member.name.removeprefix("./") == name and member.isfile() and member.size <= _LARGEST_MANIFEST_FILE:
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise KeyError(name)


def _readme(path: Path) -> str:
    file = path / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _runner(runner: Mapping[str, Any]) -> dict[str, Any]:
    resources = _mapping(runner.get("resource_config"))
    return {
        "name": runner.get("name") or "",
        "runnable_type": runner.get("runnable_type") or "",
        "models": runner.get("models") or [],
        "resource_config": {
            "cpu": resources.get("cpu"),
            "nvidia_gpu": resources.get("nvidia.com/gpu"),
            "custom_resources": resources.get("custom_resources"),
        }
        if resources
        else None,
    }


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # older bento.yaml files name a model by its tag alone
        return {"tag": value}
    return dict(value) if isinstance(value, Mapping) else {}


def _labels(info: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in _mapping(info.get("labels")).items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _time(value: Any) -> datetime | None:
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
