"""What a bento runs while its image is built, read from its files."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.builder import containerfiles
from services.builder.commands import Script, make_commands, secrets_of
from services.builder.recipe import BentoFiles
from services.builder.runs import runs_uv

HOME = "/root"
"""Of root, in an image."""

EVERY = (
    "apt-get update && apt-get install -q -y --no-install-recommends --allow-remove-essential "
    "ca-certificates gnupg2 bash build-essential git"
)
PACKAGES = "apt-get install -q -y -o Dpkg::Options::=--force-confdef sl"

OLD = r"""
# Block SETUP_BENTO_BASE_IMAGE
FROM python:3.11-slim as base-container
ENV LANG=C.UTF-8
USER root

ENV DEBIAN_FRONTEND=noninteractive
RUN rm -f /etc/apt/apt.conf.d/docker-clean; echo 'Binary::apt::APT::Keep-Downloaded-Packages "true";' > /etc/apt/apt.conf.d/keep-cache
RUN set -eux && \
    apt-get update -y && \
    apt-get install -q -y --no-install-recommends --allow-remove-essential \
        ca-certificates gnupg2 bash build-essential sl
# Block SETUP_BENTO_USER
ARG BENTO_USER=bentoml
ARG BENTO_USER_UID=1034
ARG BENTO_USER_GID=1034
RUN groupadd -g $BENTO_USER_GID -o $BENTO_USER && useradd -m -u $BENTO_USER_UID -g $BENTO_USER_GID -o -r $BENTO_USER
ENV GREETING=good day
ARG BENTO_PATH=/home/bentoml/bento
ENV BENTO_PATH=$BENTO_PATH
RUN mkdir $BENTO_PATH && chown bentoml:bentoml $BENTO_PATH -R
WORKDIR $BENTO_PATH
COPY --chown=bentoml:bentoml ./env/python ./env/python/
# install python packages with install.sh
RUN bash -euxo pipefail /home/bentoml/bento/env/python/install.sh
COPY --chown=bentoml:bentoml . ./
# Default port for BentoServer
EXPOSE 3000
EXPOSE 3001
RUN chmod +x /home/bentoml/bento/env/docker/entrypoint.sh
USER bentoml
ENTRYPOINT [ "/home/bentoml/bento/env/docker/entrypoint.sh" ]
RUN rm -rf /var/lib/{apt,cache,log}
"""


def of_image(commands: list[str], post_commands: list[str] | None = None, **manifest: object) -> BentoFiles:
    image = {"base_image": "python:3.11-slim", "commands": commands, "post_commands": post_commands or []}
    return BentoFiles({"image": image, **manifest}, "", scripts=("script__0123456789abcdef",))


def runs(script: object) -> list[str]:
    return [each for each in script.instructions if each.startswith("RUN")]  # type: ignore[attr-defined]


def test_a_bento_without_commands_of_its_own_runs_nothing() -> None:
    assert not make_commands(of_image([EVERY]))
    assert not make_commands(BentoFiles({"docker": {"distro": "debian", "env": {"A": "b"}}}, "", dockerfile=OLD))


def test_an_old_bento_of_another_system_runs_what_bentoml_installs_there() -> None:
    text = OLD.replace("slim", "alpine").replace(
        "RUN set -eux && \\\n    apt-get update -y && \\", "RUN apk add bash shadow"
    )
    commands = make_commands(BentoFiles({"docker": {"distro": "alpine"}}, "", dockerfile=text))
    assert commands.before is not None and commands.after is None
    assert "RUN apk add bash shadow" in runs(commands.before)
    assert not make_commands(BentoFiles({"docker": {"distro": "alpine", "base_image": "x"}}, "", dockerfile=text))


def test_packages_alone_need_no_compiler_and_other_commands_may() -> None:
    lean = make_commands(of_image([EVERY, PACKAGES]))
    assert lean.before is not None and lean.after is None
    assert runs(lean.before) == ["RUN apt-get update", f"RUN {PACKAGES}"]
    full = make_commands(of_image([EVERY, PACKAGES, "make all"]))
    assert full.before is not None
    assert runs(full.before) == [f"RUN {EVERY}", f"RUN {PACKAGES}", "RUN make all"]


def test_commands_on_the_environment_find_its_scripts_and_the_lists_of_packages() -> None:
    script = "./env/docker/script__0123456789abcdef"
    commands = make_commands(of_image([EVERY], [f"chmod +x {script} && {script}", PACKAGES]))
    assert commands.after is not None and not commands.on_bento
    assert commands.after.files == ("env/docker/script__0123456789abcdef",)
    assert f"COPY --chown=1034:1034 {script} {script}" in commands.after.instructions
    assert runs(commands.after)[0] == "RUN apt-get update"


def test_commands_on_the_environment_find_what_it_was_made_of() -> None:
    commands = make_commands(replace(of_image(["true"], ["wc -l env/python/requirements.txt"]), has_python=True))
    assert commands.before is not None and commands.after is not None
    assert commands.before.files == () and commands.after.files == ("env/python",)
    assert "COPY --chown=1034:1034 ./env/python ./env/python" in commands.after.instructions


def test_commands_and_scripts_on_the_environment_may_run_uv(tmp_path: Path) -> None:
    script = tmp_path / "env" / "docker" / "script__0123456789abcdef"
    script.parent.mkdir(parents=True)
    files = ("env/docker/script__0123456789abcdef", "src/data")
    for text, expected in (("uv pip install flash-attn", True), ("echo luv", False)):
        script.write_text(f"#!/bin/sh\n{text}\n")
        assert runs_uv(Script((), files=files), tmp_path) == expected
    assert runs_uv(Script(("RUN uv --version",)), tmp_path)


def test_secrets_reach_every_command_by_file_and_are_not_shown() -> None:
    files = of_image(["echo 1"], envs=[{"name": "TOKEN", "value": "", "stage": "build"}, {"name": "A", "value": 'b"$'}])
    assert secrets_of(files.manifest) == {"TOKEN": ""}
    before = make_commands(files, ["TOKEN"]).before
    assert before is not None
    assert r'ENV A="b\"\$"' in before.instructions
    (run,) = runs(before)
    assert run == 'RUN --mount=type=secret,id=TOKEN export TOKEN="$(cat /run/secrets/TOKEN)"; echo 1'
    assert containerfiles.without_secrets(run) == "RUN echo 1"


def test_of_an_old_bento_the_part_that_layers_take_the_place_of_is_left_out() -> None:
    docker = {"distro": "debian", "system_packages": ["sl"], "env": {"GREETING": "good day"}}
    commands = make_commands(BentoFiles({"docker": docker}, "", dockerfile=OLD))
    assert commands.before is not None and commands.after is None and commands.on_bento
    (run,) = runs(commands.before)
    assert "ca-certificates bash sl" in run and "build-essential" not in run
    assert 'ENV GREETING="good day"' in commands.before.instructions
    assert commands.before.files == ()


def test_an_old_bentos_variable_of_several_lines_is_named() -> None:
    text = OLD.replace("GREETING=good day", "GREETING=good\nUSER nobody")
    docker = {"system_packages": ["sl"], "env": {"GREETING": "good\nUSER nobody"}}
    with pytest.raises(FailedPrecondition, match=r"'GREETING'.* line break") as refused:
        make_commands(BentoFiles({"docker": docker}, "", dockerfile=text))
    assert refused.value.reason == "BENTO_INCOMPLETE"
    docker["env"] = {"GREETING": "good day\n"}  # an empty line is none of a Dockerfile's
    assert make_commands(BentoFiles({"docker": docker}, "", dockerfile=OLD)).before is not None


def test_what_a_template_adds_runs_on_the_whole_bento_and_may_copy_from_stages() -> None:
    text = "FROM golang AS tools\nCOPY src/go.mod .\nRUN make\n" + OLD
    text = text.replace("# Default port", 'SHELL ["/bin/bash", "-c"]\nCOPY --from=tools /x /x\nRUN --network=none x\n')
    docker = {"dockerfile_template": "t", "env": {"GREETING": "good day"}}
    commands = make_commands(BentoFiles({"docker": docker}, "", dockerfile=text), ["S"])
    assert commands.before is not None and commands.after is not None
    assert "build-essential" in runs(commands.before)[0], "a template may use the compiler"
    assert commands.before.stages == () and commands.after.stages[0] == "FROM golang AS tools"
    assert commands.after.files == ("src/go.mod",)
    assert "ARG BENTO_PATH=/home/bentoml/bento" in commands.after.instructions
    assert 'RUN --network=none --mount=type=secret,id=S export S="$(cat /run/secrets/S)"; x' in runs(commands.after)
    assert 'ENTRYPOINT [ "/home/bentoml/bento/env/docker/entrypoint.sh" ]' in commands.after.instructions


@pytest.mark.parametrize(
    ("manifest", "dockerfile", "reason"),
    [
        ({"docker": {"setup_script": "x"}, "conda": {"dependencies": ["blas"]}}, OLD, "CONDA_UNSUPPORTED"),
        ({"docker": {"dockerfile_template": "x"}}, "FROM scratch\nCOPY . .\n", "TEMPLATE_UNSUPPORTED"),
        ({"docker": {"dockerfile_template": "x"}}, f"{OLD}\nFROM scratch\n", "TEMPLATE_UNSUPPORTED"),
        ({"docker": {"setup_script": "x"}}, "", "BENTO_INCOMPLETE"),
        ({"image": {"commands": ["./env/docker/script__0"]}}, "", "BENTO_INCOMPLETE"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(manifest: dict[str, object], dockerfile: str, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        make_commands(BentoFiles(manifest, "", dockerfile=dockerfile))
    assert caught.value.reason == reason


def test_instructions_are_read_with_continuations_comments_and_here_documents() -> None:
    text = (
        '# syntax=x\nFROM a\nRUN one && \\\n  # a comment\n\n  two\nRUN <<EOF\n# kept\nthree\nEOF\ncopy ["a b", "c"]\n'
    )
    (stage,) = containerfiles.stages(text)
    assert [each.flat for each in stage] == [
        "FROM a",
        "RUN one && two",
        "RUN <<EOF # kept three EOF",
        'copy ["a b", "c"]',
    ]
    assert stage[2].text == "RUN <<EOF\n# kept\nthree\nEOF"
    assert [containerfiles.sources(each) for each in stage] == [[], [], [], ["."]]
    (copy,) = containerfiles.instructions("COPY --chown=1:1 ./a 'b c' x* https://host/f /to/")
    assert containerfiles.sources(copy) == ["a", "b c", ".", "https://host/f"][:3]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--mount=type=bind,source=req.txt,target=/r", ["."]),
        ("--mount=source=req.txt,target=/r", ["."]),
        ("--network=none \\\n  --mount=target=/r,ro", ["."]),
        ("--mount=from=tools,target=/r", []),
        (f"--mount=type=cache,target={HOME}/.cache", []),
        ("--mount=type=secret,id=x --mount=type=tmpfs,target=/t", []),
        ("echo --mount=target=/r", []),
    ],
)
def test_a_mount_shows_the_bento_unless_it_says_what_else_it_shows(flags: str, expected: list[str]) -> None:
    (run,) = containerfiles.instructions(f"RUN {flags} cat /r")
    assert containerfiles.sources(run) == expected
    before = make_commands(of_image([f"{flags} cat /r"])).before
    assert before is not None and list(before.files) == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("a && \\\n  b", "RUN a &&   b"),
        ("apt-get install \\\n  # why\n\n  sl", "RUN apt-get install   sl"),
        ("a\nCOPY --from=x /a /b", 'RUN ["/bin/sh", "-c", "a\\nCOPY --from=x /a /b"]'),
        ("--mount=type=tmpfs,target=/t a\nb", 'RUN --mount=type=tmpfs,target=/t ["/bin/sh", "-c", "a\\nb"]'),
        ("cat > /x <<EOF\nü\nEOF", 'RUN ["/bin/sh", "-c", "cat > /x <<EOF\\nü\\nEOF"]'),
        ("<<'END'\na\nb\nEND", 'RUN ["/bin/sh", "-c", "a\\nb"]'),
        ("<<END\na\nEND", "RUN a"),
        ("a\rUSER 0", 'RUN ["/bin/sh", "-c", "a\\rUSER 0"]'),
        ("--network=none\nFROM oci:/x", "RUN --network=none FROM oci:/x"),
        ("--network=none\n--mount=type=tmpfs,target=/t\r\na", "RUN --network=none --mount=type=tmpfs,target=/t a"),
        ("a \\", 'RUN ["/bin/sh", "-c", "a \\\\"]'),
        ("cat > /x <<EOF", 'RUN ["/bin/sh", "-c", "cat > /x <<EOF"]'),
    ],
)
def test_a_command_is_one_instruction_however_many_lines_it_has(command: str, expected: str) -> None:
    before = make_commands(of_image([command])).before
    assert before is not None and runs(before) == [expected]
    assert not any("\n" in each for each in before.instructions)


def test_what_no_instruction_can_hold_is_told_by_the_shell() -> None:
    value = "a\"\nUSER nobody\n'b'"
    files = of_image(["echo 1"], envs=[{"name": "MULTI", "value": value}, {"name": "A", "value": "1"}])
    before = make_commands(files, ["TOKEN"]).before
    assert before is not None and not any("\n" in each for each in before.instructions)
    assert "USER" not in " ".join(each for each in before.instructions if not each.startswith("RUN"))
    (run,) = runs(before)
    flag, _, form = run.removeprefix("RUN ").partition(" ")
    assert flag == "--mount=type=secret,id=TOKEN"
    assert json.loads(form)[:2] == ["/bin/sh", "-c"]
    script = (
        json.loads(form)[2].replace('"$(cat /run/secrets/TOKEN)"', "t").replace("echo 1", 'printf %s "$TOKEN$MULTI"')
    )
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == f"t{value}"


@pytest.mark.parametrize("name", ["X=1\nRUN evil", "x,from=oci:/y", "a b", "$X"])
@pytest.mark.parametrize("stage", ["all", "build"])
def test_a_variable_whose_name_would_be_an_instruction_is_refused(name: str, stage: str) -> None:
    with pytest.raises(FailedPrecondition, match="Rename it") as refused:
        make_commands(of_image(["echo 1"], envs=[{"name": name, "value": "1", "stage": stage}]))
    assert refused.value.reason == "BENTO_INCOMPLETE"


def test_files_of_any_name_are_copied() -> None:
    after = make_commands(_with_include("a b\nUSER 0")).after
    assert after is not None
    assert 'COPY --chown=1034:1034 ["./src/a b\\nUSER 0", "./src/a b\\nUSER 0"]' in after.instructions


def _with_include(name: str) -> BentoFiles:
    return BentoFiles({"image": {"post_commands": ["ls"], "build_include": [name]}}, "")


def test_the_environment_goes_before_a_path_of_the_bento_s_own_once_it_is_there() -> None:
    commands = make_commands(
        of_image(["which python"], ["which python"], envs=[{"name": "PATH", "value": "/cuda:/bin"}])
    )
    assert commands.before is not None and commands.after is not None
    assert 'ENV PATH="/cuda:/bin"' in commands.before.instructions
    assert 'ENV PATH="/app/.venv/bin:/cuda:/bin"' in commands.after.instructions
