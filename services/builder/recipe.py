"""What a bento asks for, from its files: Python, requirements, options. Pure, so equal bentos give equal digests.

Bentos of 1.4 (spec 2) carry `image` in bento.yaml, older ones (spec 1, and all of 1.0 to 1.3) `docker`, `python` and
`conda`. Source: the layout of bentos as the clients write them.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from ekiben.errors import FailedPrecondition
from services.builder.domain import RECIPE_VERSION
from services.builder.requirements import Option, Requirement, parse, parse_arguments

_USUAL_INDEX = re.compile(r"https?://pypi\.[a-z]+/simple/?")
"""Clients write this line into every lock. It means "the usual index", which here an operator may have set."""

TRACING = ("opentelemetry-exporter-otlp", "opentelemetry-exporter-otlp-proto-http")
"""What lets a replica send its spans and monitor logs over OTLP/HTTP, tried in this order. First both exporters, as
BentoML's own extras `tracing-otlp` and `monitor-otlp` have it: the gRPC one is not used here, but `bentoml.monitor()`
imports both before it asks which, and without it each request of a service that monitors fails with 500. It brings
grpcio and what that needs of protobuf, which may not go with the bento: then spans are still to be had."""

TO_UV = {"--index-url", "--extra-index-url", "--find-links", "--no-index", "--no-binary", "--only-binary"}
"""Options that uv reads in a requirements file as pip does."""
WITHOUT_MEANING = {"--require-hashes", "--no-cache-dir", "--quiet", "--prefer-binary", "--no-warn-script-location"}
"""Options that say how pip should work, not what should be installed."""


@dataclass(frozen=True)
class BentoFiles:
    """What the builder reads of an unpacked bento."""

    manifest: Mapping[str, Any]
    """bento.yaml."""
    requirements: str
    """The requirements file which the bento's own image would install: the lock where there is one."""
    version_txt: str = ""
    """env/python/version.txt: the Python of whoever built a bento before 1.4."""
    shipped: Mapping[str, str] | None = None
    """Archives and source folders in the bento, relative path → digest. See `Recipe.shipped`."""
    scripts: Sequence[str] = ()
    """Scripts in env/docker that run while an image is built."""
    dockerfile: str = ""
    """env/docker/Dockerfile, as the bento's BentoML rendered it."""
    constraints: str = ""
    """What the files say that `requirements` named by `-c`."""
    has_python: bool = False
    """Whether there is env/python, which commands find in BentoML's own images."""


@dataclass(frozen=True)
class Rule:
    """A version that a package must have for an old BentoML to start."""

    before: str
    """Holds for BentoML below this version."""
    package: str
    specifier: str
    why: str
    since: str = "0"
    """And from this version on."""
    parts: tuple[str, ...] = ()
    """Packages that `package` fixes the version of: where its own lock gives way, so do theirs."""


RULES = (
    Rule("1.4", "setuptools", "<81", "its file system layer imports pkg_resources, which setuptools 81 removed"),
    Rule("1.2", "cattrs", "<23.2", "with 23.2 it reads and writes bento.yaml without name and version"),
    Rule("1.3.5", "pydantic", ">=2,<2.9", "it uses internals of pydantic that 2.9 removed", "1.2", ("pydantic-core",)),
)


@dataclass(frozen=True)
class Recipe:
    """What to install, and where from."""

    python: str
    """`3.11` or `3.11.7`."""
    bentoml_version: str
    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    """What replicas of this platform get besides: the first of these that can be resolved with the rest, else none."""
    options: tuple[str, ...] = ()
    """Lines which uv reads: indexes, links, binaries. They may hold `${VARIABLE}`, filled in from the secrets."""
    prerelease: bool = False
    insecure_hosts: tuple[str, ...] = ()
    hashes: Mapping[str, tuple[str, ...]] | None = None
    """Hashes that the bento itself demands, by package."""
    shipped: Mapping[str, str] | None = None
    """Files of the bento which requirements name as `shipped:<path>`: path → digest."""
    notes: tuple[str, ...] = ()
    """Sentences for the log: what was changed, and what a local environment cannot do. Not part of the digest."""
    skipped: tuple[str, ...] = ()
    """Those of the notes that hold for a local environment only: images have it."""

    @property
    def has_variables(self) -> bool:
        """Whether a secret is filled into a line, so that it may resolve to what only some may have."""
        return any("${" in line for line in (*self.options, *self.requirements, *self.constraints))

    def digest(self, *parts: str, scope: str = "") -> str:
        """Equal for recipes that resolve alike; `parts` are what else the lock depends on, Python and platform.

        `scope` is who alone may have the lock.
        """
        content = {
            "recipe": RECIPE_VERSION,
            "requirements": self.requirements,
            "constraints": self.constraints,
            "extras": self.extras,
            "options": self.options,
            "prerelease": self.prerelease,
            "hashes": sorted((self.hashes or {}).items()),
            "shipped": sorted((self.shipped or {}).items()),
            "parts": parts,
            **({"scope": scope} if scope else {}),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def environment_digest(lock: str, python_version: str, platform: str, scope: str = "") -> str:
    """`sha256:<hex>`; bentos whose locks are equal share the environment, in the same `scope`: see `Work.scope`."""
    of = f" of {scope}" if scope else ""
    text = f"ekiben environment {RECIPE_VERSION}{of}\n{platform}\n{python_version}\n{lock}"
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def make_recipe(files: BentoFiles) -> Recipe:
    """The recipe of a bento.

    Raises:
        FailedPrecondition: bento.yaml names no BentoML or no Python, or its options cannot be read (BENTO_INCOMPLETE),
            or a requirement is a file that only the machine had which built the bento (REQUIREMENT_NOT_FOUND).
    """
    manifest = files.manifest
    version = _bentoml_version(manifest)
    python_options = _section(manifest, "python")
    lines = [*_options_of(python_options), *parse(files.requirements)]
    notes: list[str] = []
    shipped: dict[str, str] = {}
    requirements = [
        _resolve_location(line, version, files.shipped or {}, shipped, notes)
        for line in lines
        if isinstance(line, Requirement)
    ]
    requirements += _wheels_of(files, shipped, requirements)
    requirements = _with_bentoml(requirements, version, notes)
    requirements, constraints = _compatible(requirements, version, notes)
    limits = parse(files.constraints)
    lines += [line for line in limits if isinstance(line, Option)]
    constraints = tuple(dict.fromkeys([*constraints, *(line.text for line in limits if isinstance(line, Requirement))]))
    options = _index_options([line for line in lines if isinstance(line, Option)], notes)
    if models := hub_models(manifest):
        notes.append(
            f"WARNING: {', '.join(models.values())} of Hugging Face {'is' if len(models) == 1 else 'are'} in no image: "
            "each replica fetches it when it starts, for which it needs the network, and HF_TOKEN where it is not "
            "public. Import it into the store (bentoml.models.create) to have it in the image."
        )
    skipped = _not_done_here(manifest, files.scripts)
    return Recipe(
        python=_python(manifest, files.version_txt),
        bentoml_version=version,
        requirements=tuple(dict.fromkeys(requirement.text for requirement in requirements)),
        constraints=constraints,
        extras=() if any(r.name == TRACING[0] for r in requirements) else TRACING,
        options=tuple(dict.fromkeys(_line(option) for option in options if option.name in TO_UV)),
        prerelease=any(option.name == "--pre" for option in options),
        insecure_hosts=tuple(option.value for option in options if option.name == "--trusted-host"),
        hashes={r.name: r.hashes for r in requirements if r.name and r.hashes},
        shipped=shipped,
        notes=(*notes, *skipped),
        skipped=tuple(skipped),
    )


def hub_models(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The models that a bento has of Hugging Face, and not of BentoML's store: tag → `google-bert/bert-base`."""
    models = manifest.get("models")
    found = {}
    for each in models if isinstance(models, list) else ():
        if isinstance(each, Mapping) and each.get("registry") == "huggingface":
            metadata = each.get("metadata")
            named = metadata.get("model_id") if isinstance(metadata, Mapping) else None
            found[str(each.get("tag") or "")] = str(named or each.get("tag") or "a model")
    return found


def _section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = manifest.get(name)
    return section if isinstance(section, Mapping) else {}


def _bentoml_version(manifest: Mapping[str, Any]) -> str:
    version = str(manifest.get("bentoml_version") or "").strip()
    try:
        return Version(version).public
    except InvalidVersion:
        raise FailedPrecondition(
            f"bento.yaml names no BentoML version that can be installed ({version!r}). Build the bento again.",
            reason="BENTO_INCOMPLETE",
            bentoml_version=version,
        ) from None


def _python(manifest: Mapping[str, Any], version_txt: str) -> str:
    """The Python that the bento's image would have; where it names none, that of whoever built it."""
    named = _section(manifest, "image").get("python_version") or _section(manifest, "docker").get("python_version")
    match = re.fullmatch(r"\s*(3\.\d+(?:\.\d+)?)\s*", str(named or ""))
    if match:
        return match[1]
    match = re.match(r"\s*(3\.\d+)\b", version_txt)
    if match:
        return match[1]
    match = re.search(r"python:?(3\.\d+)", str(_section(manifest, "image").get("base_image") or ""))
    if match:
        return match[1]
    raise FailedPrecondition(
        f"bento.yaml names no Python version that can be had ({named!r}). Set docker.python_version or "
        "Image(python_version=…) and build the bento again.",
        reason="BENTO_INCOMPLETE",
        python_version=str(named or ""),
    )


def _options_of(python: Mapping[str, Any]) -> list[Option]:
    """The options that a bento of before 1.4 has in bento.yaml rather than in its requirements file."""

    def values(name: str) -> list[str]:
        value = python.get(name) or []
        return [str(value)] if isinstance(value, str) else [str(item) for item in value]

    found = [Option("--index-url", url) for url in values("index_url")]
    found += [Option("--extra-index-url", url) for url in values("extra_index_url")]
    found += [Option("--find-links", url) for url in values("find_links")]
    found += [Option("--trusted-host", host) for host in values("trusted_host")]
    found += [Option("--no-index")] if python.get("no_index") else []
    try:
        return found + parse_arguments(str(python.get("pip_args") or ""))
    except ValueError as exc:
        raise FailedPrecondition(
            f"The bento cannot be built: its python.pip_args cannot be read: {exc}. Mend them and build the bento "
            "again.",
            reason="BENTO_INCOMPLETE",
        ) from exc


def _index_options(options: Sequence[Option], notes: list[str]) -> list[Option]:
    kept = []
    for option in options:
        if option.name == "--index-url" and _USUAL_INDEX.fullmatch(option.value):
            continue
        if option.name == "--find-links" and "://" not in option.value and not posixpath.isabs(option.value):
            raise FailedPrecondition(
                f"The bento's requirements look for packages in its folder {option.value!r}, and only addresses are "
                "looked in. Name the archives in it instead, as ./wheels/NAME.whl.",
                reason="REQUIREMENT_NOT_FOUND",
                requirement=_line(option),
            )
        if option.name in TO_UV or option.name in ("--pre", "--trusted-host"):
            kept.append(option)
        elif option.name in ("--requirement", "--constraint"):
            raise FailedPrecondition(
                f"The bento's requirements name the file {option.value!r}, which is not in the bento. Put it below src "
                "and build the bento again, or write its lines into the requirements.",
                reason="REQUIREMENT_NOT_FOUND",
                requirement=f"{option.name} {option.value}",
            )
        elif option.name not in WITHOUT_MEANING:
            notes.append(f"The option {option.name} of the bento's requirements has no meaning here and is left out.")
    return kept


def _line(option: Option) -> str:
    return f"{option.name} {option.value}".strip()


def _resolve_location(
    requirement: Requirement, version: str, available: Mapping[str, str], used: dict[str, str], notes: list[str]
) -> Requirement:
    """A requirement that names a file, pointed at the bento's own copy of it."""
    path = requirement.path
    if not path:
        return requirement
    # Relative to where the bento's image runs the installer: src, or env/python for the layout before 1.4.
    for root in ("src", "env/python"):
        inside = posixpath.normpath(posixpath.join(root, path))
        if not posixpath.isabs(path) and inside in available:
            used[inside] = available[inside]
            return requirement.at(f"shipped:{inside}")
    if requirement.name == "bentoml":
        notes.append(
            f"The bento was built with a BentoML from {path}, which only that machine has; bentoml=={version} is used."
        )
        extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
        return Requirement(f"bentoml{extras}=={version}", "bentoml", f"=={version}", extras=requirement.extras)
    raise FailedPrecondition(
        f"The requirement {requirement.text!r} is a file which is not in the bento; only the machine had it that "
        "built the bento. Put it below wheels/ in the project and build again.",
        reason="REQUIREMENT_NOT_FOUND",
        requirement=requirement.text,
    )


def _wheels_of(files: BentoFiles, used: dict[str, str], named: Sequence[Requirement]) -> list[Requirement]:
    """Wheels in env/python/wheels, which older images install whether a requirement names them or not."""
    found = []
    for path, digest in sorted((files.shipped or {}).items()):
        if path.startswith("env/python/wheels/") and path.endswith(".whl") and path not in used:
            used[path] = digest
            found.append(Requirement(f"shipped:{path}", location=f"shipped:{path}"))
    return found


def _with_bentoml(requirements: Sequence[Requirement], version: str, notes: list[str]) -> list[Requirement]:
    """The requirements with the BentoML that bento.yaml names, unless they fix another."""
    pin = Requirement(f"bentoml=={version}", "bentoml", f"=={version}")
    own = [requirement for requirement in requirements if requirement.name == "bentoml"]
    if any("/bentoml-" in requirement.location for requirement in requirements if not requirement.name):
        return list(requirements)  # the bento ships a BentoML of its own
    for requirement in own:
        if requirement.location:
            return list(requirements)
        try:
            fits = SpecifierSet(requirement.specifier).contains(version, prereleases=True)
        except InvalidSpecifier:
            fits = True
        if not fits:
            notes.append(f"The bento was built with BentoML {version} but requires {requirement.text}: that is used.")
            return list(requirements)
    return [*requirements, pin] if not any(requirement.pinned == version for requirement in own) else list(requirements)


def _compatible(
    requirements: Sequence[Requirement], version: str, notes: list[str]
) -> tuple[list[Requirement], tuple[str, ...]]:
    """The requirements, and constraints, with which a BentoML of this age starts. A lock that prevents it gives way."""
    kept, constraints = list(requirements), []
    for rule in RULES:
        if not Version(rule.since) <= Version(version) < Version(rule.before):
            continue
        text = f"{rule.package}{rule.specifier}"
        pin = next((r.pinned for r in kept if r.name == rule.package and r.pinned), "")
        if pin and SpecifierSet(rule.specifier).contains(pin, prereleases=True):
            continue
        constraints.append(text)
        if pin:
            kept = [r for r in kept if r.name not in (rule.package, *rule.parts) or not r.pinned]
            kept.append(Requirement(text, rule.package, rule.specifier))
        instead = f" instead of the locked {pin}" if pin else ""
        notes.append(f"{text} is taken{instead}, for BentoML {version}: {rule.why}.")
    return kept, tuple(constraints)


def _not_done_here(manifest: Mapping[str, Any], scripts: Sequence[str]) -> list[str]:
    """What the bento asks of an image and a local environment does not do."""
    image, docker, conda = (_section(manifest, name) for name in ("image", "docker", "conda"))
    found = []
    # Clients put one command of their own first, the packages that building in a plain image needs.
    commands = [c for c in image.get("commands") or [] if "ca-certificates gnupg2 bash build-essential" not in str(c)]
    commands += image.get("post_commands") or []
    found += [f"the command {str(command)!r}" for command in commands]
    if docker.get("system_packages"):
        found.append(f"the system packages {', '.join(map(str, docker['system_packages']))}")
    if docker.get("setup_script") or (scripts and not commands):
        found.append("the setup script")
    if docker.get("dockerfile_template"):
        found.append("the Dockerfile template")
    if docker.get("cuda_version"):
        found.append(f"CUDA {docker['cuda_version']}")
    if any(conda.get(name) for name in ("environment_yml", "dependencies", "channels", "pip")):
        found.append("the conda environment")
    return [
        f"WARNING: {thing} applies to images only and is not run here; what it installs must be on this machine."
        for thing in found
    ]
