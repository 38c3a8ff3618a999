"""Reading and writing Containerfiles as far as running parts of them asks for. Pure.

Source: the Dockerfile reference of BuildKit: line continuation, comments, here-documents, flags of RUN, COPY and ADD.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_HERE = re.compile(r"<<-?[\"']?([A-Za-z_]\w*)[\"']?")
_FLAGS = re.compile(r"(?:--[a-z]\S*\s+)*")


@dataclass(frozen=True)
class Instruction:
    """One instruction, as many lines as it has."""

    text: str

    @property
    def keyword(self) -> str:
        """`RUN`, in capitals."""
        return self.text.split(None, 1)[0].upper()

    @property
    def flat(self) -> str:
        """On one line, with single spaces."""
        return " ".join(re.sub(r"\\\n", " ", self.text).split())


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Containerfile; comments are left out."""
    found: list[str] = []
    ends: list[str] = []
    for line in text.splitlines():
        if ends:
            found.append(line)
            if line.strip() == ends[0]:
                ends.pop(0)
        elif not line.strip() or line.lstrip().startswith("#"):
            continue
        else:
            found.append(line.rstrip())
            if _keyword(found) in ("RUN", "COPY", "ADD"):
                ends = _HERE.findall(line)
            if line.rstrip().endswith("\\"):
                continue
        if not ends:
            yield Instruction("\n".join(found).strip())
            found = []
    if found:
        yield Instruction("\n".join(found).rstrip("\\ \n"))


def stages(text: str) -> list[list[Instruction]]:
    """The stages of a Containerfile, each beginning with its FROM; what stands before the first is left out."""
    found: list[list[Instruction]] = []
    for each in instructions(text):
        if each.keyword == "FROM":
            found.append([each])
        elif found:
            found[-1].append(each)
    return found or [[]]


def base_of(text: str) -> str:
    """The image that the last stage begins with, as FROM has it; empty where there is none, or it is another stage, or
    has variables in it."""
    begins = [each[0].flat.split()[1:] for each in stages(text) if each]
    words = [[word for word in each if not word.startswith("--")] for each in begins]
    if not words or not words[-1]:
        return ""
    named = {each[2].lower() for each in words[:-1] if len(each) > 2 and each[1].lower() == "as"}
    image = words[-1][0]
    return "" if "$" in image or image.lower() in named else image


def copied_from(text: str) -> list[str]:
    """Every image besides its base that a Containerfile names, as it is written: after FROM of earlier stages, and
    after `from=` where that is no stage."""
    *earlier, last = stages(text)
    found: list[str] = []
    own: set[str] = set()
    for each in (*(each for stage in earlier for each in stage), *last[1:]):
        words = each.flat.split()[1:]
        if each.keyword == "FROM":
            words = [word for word in words if not word.startswith("--")]
            found += [word for word in words[:1] if word.lower() not in own]
            own |= {word.lower() for word in words[2:3]}
        elif copies_from_stage(each):
            flags = _FLAGS.match(" ".join(words)).group()  # type: ignore[union-attr]
            named = re.findall(r"(?:--|[=,])from=([^\s,]+)", flags)
            found += [word for word in named if word.lower() not in own and not word.isdigit()]
    return [each.strip("\"'") for each in found]


def sources(instruction: Instruction) -> list[str]:
    """What an instruction reads of its context, by path; `.` where that cannot be said."""
    if instruction.keyword == "RUN":
        flags = _FLAGS.match(instruction.flat.partition(" ")[2]).group()  # type: ignore[union-attr]
        return ["."] if any(_binds(each.split(",")) for each in re.findall(r"--mount=(\S+)", flags)) else []
    if instruction.keyword not in ("COPY", "ADD") or "--from=" in instruction.flat:
        return []
    words = instruction.flat.split(None, 1)[1]
    words = words[_FLAGS.match(words).end() :]  # type: ignore[union-attr]
    if words.startswith("[") or "<<" in words:
        return ["."]
    try:
        named = [each.removeprefix("./").strip("/") or "." for each in shlex.split(words)[:-1]]
    except ValueError:
        return ["."]
    return ["." if re.search(r"[*?\[$]", each) else each for each in named if "://" not in each]


def _binds(options: Sequence[str]) -> bool:
    """Whether a mount shows the context; without a type it is a bind."""
    given = dict(each.partition("=")[::2] for each in options)
    return given.get("type") not in ("cache", "secret", "ssh", "tmpfs") and "from" not in given


def copies_from_stage(instruction: Instruction) -> bool:
    """Whether it reads of an earlier stage, or of another image."""
    return "from=" in instruction.flat and instruction.keyword in ("COPY", "ADD", "RUN")


def with_secrets(command: str, secrets: Sequence[str]) -> str:
    """A shell command that has secrets for variables, from files that are in no layer; what RUN is followed by."""
    mounts = "".join(f"--mount=type=secret,id={name} " for name in secrets)
    exports = "".join(f'export {name}="$(cat /run/secrets/{name})"; ' for name in secrets)
    return f"{mounts}{exports}{command}"


def without_secrets(command: str) -> str:
    """What was given to `with_secrets`, for people."""
    command = re.sub(r"--mount=type=secret,id=\w+ ", "", command)
    return re.sub(r'export (\w+)="\$\(cat /run/secrets/\1\)"; ', "", command)


def give_secrets(instruction: Instruction, secrets: Sequence[str]) -> str:
    """An instruction's text; one that runs a shell command has the secrets."""
    if instruction.keyword != "RUN" or not secrets:
        return instruction.text
    rest = instruction.text.split(None, 1)[1]
    flags = _FLAGS.match(rest).group()  # type: ignore[union-attr]
    command = rest[len(flags) :]
    if command.startswith(("[", "<<")):
        return instruction.text  # no shell of ours to set variables in
    return f"RUN {flags}{with_secrets(command, secrets)}"


def _keyword(lines: Sequence[str]) -> str:
    return lines[0].split(None, 1)[0].upper()
