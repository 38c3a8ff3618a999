"""What a bento runs while its image is made: before its environment is there, and after. Pure.

A bento of 1.4 (spec 2) has lists of commands in bento.yaml. For an older one the Dockerfile counts that its own BentoML
rendered when the bento was built: with its distribution, its options and its template. The part of it that installs
Python packages and copies the bento is left out, for layers take its place:

    before · [environment · models · bento] · after
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekiben.errors import FailedPrecondition
from services.builder import containerfiles
from services.builder.containerfiles import Instruction
from services.builder.images import BENTO_PATH, EVERY_BENTO, commands_of, with_venv
from services.builder.recipe import BentoFiles

_SETTINGS = (
    "ENV LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONIOENCODING=UTF-8 PYTHONUNBUFFERED=1",
    f"ENV BENTO_PATH={BENTO_PATH} BENTOML_HOME=/home/bentoml/ BENTOML_HF_CACHE_DIR={BENTO_PATH}/hf-models",
    "ENV BENTOML_CONTAINERIZED=true",
)
_PACKAGES_ONLY = re.compile(r"apt-get install -q -y (-o Dpkg::Options::=--force-confdef )?[-+.:=~\w' ]+")
_COMPILER = re.compile(r"\bca-certificates gnupg2 bash build-essential( curl| git)*")
_DONE_BY_LAYERS = (
    # The user and its folders; the names are BentoML's.
    re.compile(r"RUN (if command -v groupadd.*)?(groupadd|addgroup) -g \$BENTO_USER_GID.*", re.DOTALL),
    re.compile(r"RUN mkdir \$BENTO_PATH && chown .*"),
    re.compile(rf"RUN chmod \+x {BENTO_PATH}/env/docker/entrypoint\.sh"),
    # Of no effect in the shell that runs it, or for files that are left out of layers anyway.
    re.compile(r"RUN rm -rf /var/(lib/\{apt,cache,log\}|cache/apk/\*|cache/yum)"),
    re.compile(r"RUN rm -f /etc/apt/apt.conf.d/docker-clean; echo .* > /etc/apt/apt.conf.d/keep-cache"),
)
_BENTOMLS_END = (
    re.compile(r"EXPOSE \d+"),
    re.compile(r"USER bentoml"),
    re.compile(rf'ENTRYPOINT \[ "{BENTO_PATH}/env/docker/entrypoint\.sh" \]'),
)
_ENVIRONMENT_BEGINS = (
    re.compile(r"RUN command -v uv .*"),
    re.compile(r"(COPY|ADD) (--\S+ )*\.?/?env/python \.?/?env/python/?"),
)
_BENTO_COPIED = re.compile(r"COPY (--\S+ )*\. \./?")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_LASTING = ("ARG", "SHELL")
"""Instructions that hold for the rest of a stage and are not kept in an image."""


@dataclass(frozen=True)
class Script:
    """Instructions of a Containerfile to run on an image that is there."""

    instructions: tuple[str, ...]
    stages: tuple[str, ...] = ()
    """Whole stages that the instructions copy from."""
    files: tuple[str, ...] = ()
    """What of the bento they read, by path; `.` for all of it."""
    configures: bool = False
    """Whether what they leave in the image's configuration is kept."""


@dataclass(frozen=True)
class Commands:
    """All that a bento runs."""

    before: Script | None = None
    after: Script | None = None
    on_bento: bool = False
    """Whether `after` runs when models and bento are there, as in bentos before 1.4; else it finds the environment."""

    def __bool__(self) -> bool:
        return self.before is not None or self.after is not None


NO_COMMANDS = Commands()


def make_commands(files: BentoFiles, secrets: Sequence[str] = ()) -> Commands:
    """What a bento runs; `secrets` names variables that each of its commands is given.

    Raises:
        FailedPrecondition: it asks for conda (CONDA_UNSUPPORTED), has no Dockerfile (BENTO_INCOMPLETE), or its
            template leaves nothing to put layers in place of (TEMPLATE_UNSUPPORTED).
    """
    manifest = files.manifest
    conda = manifest.get("conda")
    if isinstance(conda, Mapping) and any(conda.get(name) for name in ("environment_yml", "dependencies", "pip")):
        raise FailedPrecondition(
            "The bento has packages of conda, which the layer of its environment cannot hold. "
            "Name what it needs in python.packages, or use `bentoml containerize`.",
            reason="CONDA_UNSUPPORTED",
        )
    if not commands_of(manifest):
        return NO_COMMANDS
    if isinstance(manifest.get("image"), Mapping):
        return _of_spec_2(files, secrets)
    return _of_dockerfile(files.dockerfile, manifest.get("docker") or {}, secrets)


def secrets_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Variables for the time of building, with the values that bento.yaml gives them, if any."""
    envs = manifest.get("envs")
    return {
        str(each["name"]): str(each.get("value") or "")
        for each in (envs if isinstance(envs, list) else ())
        if isinstance(each, Mapping) and each.get("name") and each.get("stage") == "build"
    }


def _of_spec_2(files: BentoFiles, secrets: Sequence[str]) -> Commands:
    manifest, image = files.manifest, files.manifest["image"]
    before, after = (
        [str(each).strip() for each in image.get(name) or () if str(each).strip()]
        for name in ("commands", "post_commands")
    )
    others = [each for each in before if not EVERY_BENTO.fullmatch(each)]
    if len(others) < len(before) and all(_PACKAGES_ONLY.fullmatch(each) for each in (*others, *after)):
        # Nobody is there who could use the compiler, but the lists of packages are needed.
        before = ["apt-get update", *others] if others else []
    if any(re.search(r"\bapt(-get)? install\b", each) for each in after) and "apt-get update" not in " ".join(after):
        after = ["apt-get update", *after]  # the lists are in no layer
    for name in re.findall(r"\./env/docker/(script__\w+)", " ".join([*before, *after])):
        if name not in files.scripts:
            raise FailedPrecondition(
                f"The bento runs a script that is not in it, env/docker/{name}. Some clients of 1.4 lose the file of "
                "Image.run_script, and keep that of docker.setup_script in bentofile.yaml. Build the bento again.",
                reason="BENTO_INCOMPLETE",
            )
    included = ["env/python"] if files.has_python else []
    included += [f"src/{str(name).strip('/')}" for name in image.get("build_include") or ()]
    variables = _variables(manifest)
    in_venv = {**variables, "PATH": with_venv(variables["PATH"])} if "PATH" in variables else variables
    return Commands(_script(before, (), variables, secrets), _script(after, included, in_venv, secrets))


def images_named(manifest: Mapping[str, Any]) -> list[str]:
    """The images that commands of spec 2 read, by flags before them (`--mount=type=bind,from=…`)."""
    image = manifest.get("image")
    if not isinstance(image, Mapping):
        return []
    commands = [str(each) for name in ("commands", "post_commands") for each in image.get(name) or ()]
    return containerfiles.copied_from("\n".join(["FROM x", *(containerfiles.run(each, (), {}) for each in commands)]))


def _variables(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The bento's variables that commands see: those for the time of running only are not among them."""
    envs = manifest.get("envs")
    found = {}
    for each in envs if isinstance(envs, list) else ():
        if isinstance(each, Mapping) and each.get("name") and each.get("stage", "all") in ("all", "build"):
            if _NAME.fullmatch(str(each["name"])) is None:
                raise FailedPrecondition(
                    f"The bento has a variable {str(each['name'])[:80]!r}, and commands can be given none of that "
                    "name: letters, digits and `_` make one. Rename it and build the bento again.",
                    reason="BENTO_INCOMPLETE",
                )
            if each.get("stage", "all") == "all" and each.get("value"):
                found[str(each["name"])] = str(each["value"])
    return found


def _script(
    commands: Sequence[str], files: Sequence[str], variables: Mapping[str, str], secrets: Sequence[str]
) -> Script | None:
    if not commands:
        return None
    scripts = re.findall(r"\./(env/docker/script__\w+)", " ".join(commands))
    copied = [*dict.fromkeys(scripts), *files]
    # An instruction ends with its line, so what has several is told by the shell.
    long = {name: value for name, value in variables.items() if re.search(r"[\r\n]", value)}
    settings = [f'{name}="{_escaped(value)}"' for name, value in variables.items() if name not in long]
    runs = [containerfiles.run(command, secrets, long) for command in commands]
    instructions = [
        *_SETTINGS,
        *(f"ENV {each}".replace("$", r"\$") for each in settings),
        f"WORKDIR {BENTO_PATH}",
        *(f"COPY --chown=1034:1034 {_both(f'./{name}')}" for name in copied),
        *runs,
    ]
    mounted = [name for run in runs for name in containerfiles.sources(Instruction(run))]
    return Script(tuple(instructions), files=tuple(dict.fromkeys([*copied, *mounted])))


def _both(name: str) -> str:
    """What is copied, to the same place."""
    return f"{name} {name}" if shlex.quote(name) == name else json.dumps([name, name], ensure_ascii=False)


def _of_dockerfile(dockerfile: str, docker: Mapping[str, Any], secrets: Sequence[str]) -> Commands:
    if not dockerfile:
        raise FailedPrecondition(
            "The bento cannot be built: it has no env/docker/Dockerfile. Build the bento again.",
            reason="BENTO_INCOMPLETE",
        )
    *earlier, last = containerfiles.stages(dockerfile)
    begin = next((n for n, each in enumerate(last) if _is(each, _ENVIRONMENT_BEGINS)), None)
    end = next((n for n, each in enumerate(last) if begin is not None and n > begin and _is(each, (_BENTO_COPIED,))), 0)
    if begin is None or not end:
        raise FailedPrecondition(
            "The bento's Dockerfile template leaves out what BentoML does in the block SETUP_BENTO_COMPONENTS, or does "
            "not end with it, so that nothing says where its environment belongs. Call super() in that block, or use "
            "`bentoml containerize`.",
            reason="TEMPLATE_UNSUPPORTED",
        )
    # A compiler is installed for packages without wheels; what else would use it is a script or a template.
    lean = not any(docker.get(name) for name in ("setup_script", "dockerfile_template", "cuda_version"))
    env = docker.get("env")
    env = env if isinstance(env, Mapping) else {}
    for name in (name for name, value in env.items() if re.search(r"[\r\n]\s*\S", str(value))):
        raise FailedPrecondition(
            f"The bento's variable {str(name)[:80]!r} has a line break in its value, and its BentoML writes what "
            "follows into env/docker/Dockerfile as other instructions. Set it where the bento runs, or build the bento "
            "with BentoML 1.4 or later.",
            reason="BENTO_INCOMPLETE",
        )
    spaced = {f"ENV {k}={v}": (k, v) for k, v in env.items() if " " in str(v)}
    before = [
        _quoted(*spaced[each.flat]) if each.flat in spaced else _lean(each) if lean else each
        for each in last[1:begin]
        if not _is(each, _DONE_BY_LAYERS)
    ]
    after = [each for each in last[end + 1 :] if not _is(each, _DONE_BY_LAYERS)]
    lasting = [each for each in before if each.keyword in _LASTING]
    if all(_is(each, _BENTOMLS_END) for each in after):
        after = []
    return Commands(
        _of_instructions(before, earlier, secrets),
        _of_instructions([*lasting, *after], earlier, secrets) if after else None,
        on_bento=True,
    )


def _of_instructions(
    instructions: Sequence[Instruction], earlier: Sequence[Sequence[Instruction]], secrets: Sequence[str]
) -> Script:
    files = list(dict.fromkeys(name for each in instructions for name in containerfiles.sources(each)))
    stages: tuple[str, ...] = ()
    if any(containerfiles.copies_from_stage(each) for each in instructions):
        stages = tuple(each.text for stage in earlier for each in stage)
        files += [name for stage in earlier for each in stage for name in containerfiles.sources(each)]
    return Script(
        tuple(containerfiles.give_secrets(each, secrets) for each in instructions), stages, tuple(files), True
    )


def _is(instruction: Instruction, patterns: Sequence[re.Pattern[str]]) -> bool:
    return any(pattern.fullmatch(instruction.flat) for pattern in patterns)


def _quoted(name: str, value: str) -> Instruction:
    """What BentoML writes without quotes, and engines then cannot read."""
    return Instruction(f'ENV {name}="{_escaped(value)}"')


def _escaped(value: str) -> str:
    return re.sub(r'([\\"])', r"\\\1", value)


def _lean(instruction: Instruction) -> Instruction:
    if instruction.keyword != "RUN" or "apt-get install" not in instruction.text:
        return instruction
    return Instruction(_COMPILER.sub("ca-certificates bash", instruction.text))
