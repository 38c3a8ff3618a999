"""Reading and writing Containerfiles as far as running parts of them asks for. Pure.

Source: the Dockerfile reference of BuildKit: line continuation, comments, here-documents, flags of RUN, COPY and ADD.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_HERE = re.compile(r"<<-?[\"']?([A-Za-z_]\w*)[\"']?")
_CONTINUED = re.compile(r"\\[ \t]*\n(?:[ \t]*(?:#[^\n]*)?\n)*")
"""With the comments and empty lines that follow: they end nothing."""
_HERE_SCRIPT = re.compile(r"<<-?[\"']?(?P<end>[A-Za-z_]\w*)[\"']?[ \t]*\n(?P<script>.*)\n\s*(?P=end)", re.DOTALL)
_FLAGS = re.compile(r"(?:--[a-z]\S*\s+)*")
_NOT_ALONE = re.compile(r"[\r\n]|\\[ \t]*$|<<-?[\"']?[A-Za-z_]")
"""In a shell command what makes instructions of its lines, or takes those of the next instructions for its own."""


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


def instructions(text: str, *, here_documents: bool = True) -> Iterator[Instruction]:
    """The instructions of a Containerfile; comments are left out."""
    found: list[str] = []
    ends: list[str] = []
    for line in re.split(r"\r?\n", text):  # a form feed or U+2028 ends no line of an engine's
        if ends:
            found.append(line)
            if line.strip() == ends[0]:
                ends.pop(0)
        elif not line.strip() or line.lstrip().startswith("#"):
            continue
        else:
            found.append(line.rstrip())
            if here_documents and _keyword(found) in ("RUN", "COPY", "ADD"):
                ends = _HERE.findall(line)
            if line.rstrip().endswith("\\"):
                continue
        if not ends:
            yield Instruction("\n".join(found).strip())
            found = []
    if found:
        yield Instruction("\n".join(found).rstrip("\\ \n"))


def stages(text: str, *, here_documents: bool = True) -> list[list[Instruction]]:
    """The stages of a Containerfile, each beginning with its FROM; what stands before the first is left out."""
    found: list[list[Instruction]] = []
    for each in instructions(text, here_documents=here_documents):
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
    """Every image besides its base that a Containerfile names: after FROM of earlier stages, and after `from=` where
    that is no stage.

    An engine that knows no here-documents takes their lines for instructions, and one that knows them may see none
    where others do: both are looked at.
    """
    return list(dict.fromkeys([*_copied_from(stages(text)), *_copied_from(stages(text, here_documents=False))]))


def _copied_from(stages: Sequence[Sequence[Instruction]]) -> Iterator[str]:
    *earlier, last = stages
    own: set[str] = set()
    for each in (*(each for stage in earlier for each in stage), *last[1:]):
        rest = _CONTINUED.sub("", each.text).split(None, 1)[1:]
        if each.keyword == "FROM":
            words = [re.sub(r"[\"'\\]", "", word) for word in "".join(rest).split() if not word.startswith("--")]
            yield from (word for word in words[:1] if word.lower() not in own)
            own |= {word.lower() for word in words[2:3]}
        elif each.keyword in ("COPY", "ADD", "RUN"):
            named = re.findall(r"\bfrom=\s*([^,]+)", " , ".join(_flags("".join(rest))), re.IGNORECASE)
            yield from (
                word.strip() for word in named if word.strip().lower() not in own and not word.strip().isdigit()
            )


def _flags(text: str) -> Iterator[str]:
    """The flags before what an instruction does, as engines read them: quotes and backslashes mean as in a shell."""
    text = re.sub(r"[\x1c-\x1f]", "_", text)  # space in Python, and in no engine
    text, word, quote = text.lstrip(), "", ""
    while text.startswith("--"):
        while text and (quote or not text[0].isspace()):
            if text[0] == "\\":
                word, text = word + text[1:2], text[2:]
                continue
            if quote or text[0] in "\"'":
                word += text[0] if quote and text[0] != quote else ""
                quote = "" if quote == text[0] else quote or text[0]
            else:
                word += text[0]
            text = text[1:]
        yield word
        text, word, quote = text.lstrip(), "", ""


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


def run(command: str, secrets: Sequence[str], variables: Mapping[str, str]) -> str:
    """The instruction that runs a shell command with flags before it, and nothing else, however many lines it has.

    Args:
        variables: what it finds besides: values that no ENV can hold.
    """
    command = _CONTINUED.sub("", command.strip())
    flags = _FLAGS.match(command).group()  # type: ignore[union-attr]
    script, flags = command[len(flags) :], re.sub(r"\s+", " ", flags)
    if (here := _HERE_SCRIPT.fullmatch(script)) is not None:
        script = here["script"]
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in variables.items())
    given = with_secrets(f"{exports}{script}", secrets)
    mounts = _FLAGS.match(given).group()  # type: ignore[union-attr]
    shell = given[len(mounts) :] if secrets else given
    if not _NOT_ALONE.search(shell):
        return f"RUN {flags}{given}"
    mounts = mounts if secrets else ""
    return f"RUN {flags}{mounts}{json.dumps(['/bin/sh', '-c', shell], ensure_ascii=False)}"


def without_secrets(command: str) -> str:
    """What was given to `with_secrets`, for people."""
    command = re.sub(r"--mount=type=secret,id=\w+ ", "", command)
    return re.sub(r'export (\w+)=\\?"\$\(cat /run/secrets/\1\)\\?"; ', "", command)


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
