"""What uv printed, as a reason and a sentence that names the requirement. Pure.

The words are those of uv 0.9 to 0.13; what is not recognised is UV_FAILED with uv's own text, never an error of ours.
"""

import re
from collections.abc import Mapping

from ekiben import errors
from ekiben.errors import EkibenError
from services.builder.domain import Failure

CODES: Mapping[str, type[EkibenError]] = {
    "REQUIREMENT_UNSATISFIABLE": errors.FailedPrecondition,
    "REQUIREMENT_NOT_FOUND": errors.FailedPrecondition,
    "REQUIREMENT_INVALID": errors.FailedPrecondition,
    "REQUIREMENT_HASH_MISMATCH": errors.FailedPrecondition,
    "BUILD_BACKEND_FAILED": errors.FailedPrecondition,
    "WHEEL_NOT_FOUND": errors.FailedPrecondition,
    "PYTHON_NOT_FOUND": errors.FailedPrecondition,
    "BENTO_INCOMPLETE": errors.FailedPrecondition,
    "BENTO_NOT_UPLOADED": errors.FailedPrecondition,
    "ENVIRONMENT_BROKEN": errors.FailedPrecondition,
    "INDEX_REFUSED": errors.FailedPrecondition,
    "INDEX_UNREACHABLE": errors.Unavailable,
    "GIT_FAILED": errors.FailedPrecondition,
    "DISK_FULL": errors.ResourceExhausted,
    "BUILD_TIMEOUT": errors.DeadlineExceeded,
    "WORKER_LOST": errors.Unavailable,
    "STORAGE_FULL": errors.ResourceExhausted,
    "MODEL_NOT_FOUND": errors.NotFound,
    "BENTO_NOT_FOUND": errors.NotFound,
    "IMAGE_NOT_FOUND": errors.NotFound,
    "BLOB_DAMAGED": errors.DataLoss,
    "BLOB_CORRUPT": errors.DataLoss,
    "BASE_DENIED": errors.PermissionDenied,
    "UV_FAILED": errors.FailedPrecondition,
    "INTERNAL": errors.Internal,
}
"""Reasons of a failed build and the class of error that each is."""

_REQUIREMENT = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]*(?:\[[^\]]*\])?\s*(?:(?:[=<>!~]=?=?)[^\s,`()]+)?")
_MOST_CHARS = 1200
"""Of uv's text in a message: a status travels in trailers. The log has all of it."""


def parse(text: str, *, doing: str, target: str = "") -> Failure:
    """The failure that uv's output tells of; `doing` completes "uv failed while …".

    `target` is what packages are wanted for where only wheels are taken.
    """
    flat = _flatten(text)
    if target and (failure := _disk(flat) or _wheel(flat, target)) is not None:
        return failure
    for read in (_disk, _hash, _unreachable, _not_in_index, _unsatisfiable, _git, _backend, _missing_file, _invalid):
        failure = read(flat)
        if failure is not None:
            return failure
    return Failure("UV_FAILED", f"uv failed while {doing}: {_cut(flat) or 'it printed nothing'}", {"doing": doing})


def to_error(failure: Failure) -> EkibenError:
    """The failure as an error: its class by its reason."""
    error = CODES.get(failure.reason, errors.FailedPrecondition)(failure.message, reason=failure.reason)
    error.metadata = dict(failure.metadata)
    return error


def of_error(error: EkibenError) -> Failure:
    """An error, kept as a failure."""
    return Failure(error.reason, error.message, error.metadata)


def _disk(text: str) -> Failure | None:
    if re.search(r"No space left on device|os error 28|Disk quota exceeded", text):
        return Failure("DISK_FULL", "The disk is full. Free some space and build again.", {})
    return None


def _hash(text: str) -> Failure | None:
    match = re.search(r"Hash mismatch for [`']?([^`'\s]+)[`']?", text)
    if match is None:
        return None
    return Failure(
        "REQUIREMENT_HASH_MISMATCH",
        f"What the index gives for {match[1]} does not have the hash that the lock demands. {_cut(text)}",
        {"requirement": match[1]},
    )


def _wheel(text: str, target: str) -> Failure | None:
    match = (
        re.search(r"Wheels are required for [`']([^`']+)[`']", text)
        or re.search(r"([-._A-Za-z0-9]+)(?:==\S+)? has no (?:usable )?wheels?\b", text)
        or re.search(r"[Bb]uilding source distributions is disabled, but attempted to build [`']([^`'=@ ]+)", text)
    )
    if match is None:
        return None
    there = re.search(r"Wheels are available for [^\n]+? on the following platforms?: ([^\n]+)", text)
    others = f" There are wheels for {there[1].strip()}." if there else ""
    # Of Alpine and its like; most packages with C have no wheels for it.
    base = (
        "a base with glibc (Debian's, such as python:3.11-slim)" if "musl" in target else "a base with another Python"
    )
    return Failure(
        "WHEEL_NOT_FOUND",
        f"{match[1]} has no wheel for {target}, and images are made of wheels only.{others} Take a version that has "
        f"one, put a wheel for that platform below wheels/ in the project, take {base}, or have it "
        f"built in the base: --from-source {match[1]}, or the line `--no-binary {match[1]}` in the requirements.",
        {"requirement": match[1], "target": target},
    )


def _unreachable(text: str) -> Failure | None:
    match = re.search(r"Failed to (?:fetch|download)[:\s]+`?(.+?)`?(?:$|\n| cause:| Caused)", text)
    unreachable = re.search(
        r"client error \(Connect\)|error sending request|dns error|timed? ?out|Connection (?:refused|reset)"
        r"|tcp connect error|operation timed out|50[0234] ",
        text,
    )
    refused = re.search(r"\b(40[13]) (?:Unauthorized|Forbidden)|status client error \((40[13])", text)
    if not match and not (unreachable and "Request failed" in text):
        return None
    source = (match[1] if match else "").strip("` ")
    package = re.search(r"/simple/([-._A-Za-z0-9]+)/?", source) or re.match(
        r"([A-Za-z0-9][-._A-Za-z0-9]*) ?(?:@|==)", source
    )
    metadata = {"url": _without_credentials(source)}
    if package:
        metadata["requirement"] = package[1]
    subject = f"the requirement {package[1]}" if package else "a requirement"
    if refused:
        return Failure(
            "INDEX_REFUSED",
            f"The index refused to give {subject} ({metadata['url']}): it asks for credentials. Put them into a secret "
            f"with stage build. {_cut(text)}",
            metadata,
        )
    if unreachable:
        return Failure(
            "INDEX_UNREACHABLE",
            f"The index that should give {subject} cannot be reached ({metadata['url']}). {_cut(text)}",
            metadata,
        )
    if re.search(r"404 Not Found|status client error \(404", text):
        return Failure(
            "REQUIREMENT_NOT_FOUND", f"There is nothing at {metadata['url']} for {subject}. {_cut(text)}", metadata
        )
    return None


def _not_in_index(text: str) -> Failure | None:
    match = re.search(
        r"(?:Because |and |,)\s*([-._A-Za-z0-9]+) was not found in the"
        r" (?:package registry|provided package locations|cache)",
        text,
    )
    if match is None:
        return None
    if "network was disabled" in text or "in the cache" in match[0]:
        return Failure(
            "INDEX_UNREACHABLE",
            f"The requirement {match[1]} is not in the cache, and uv is offline.",
            {"requirement": match[1]},
        )
    return Failure(
        "REQUIREMENT_NOT_FOUND",
        f"The requirement {match[1]} does not exist in the package index. {_reasons(text)}",
        {"requirement": match[1]},
    )


def _unsatisfiable(text: str) -> Failure | None:
    if "No solution found" not in text and "unsatisfiable" not in text:
        return None
    subject = (
        re.search(r"there (?:is|are) no versions? of ([-._A-Za-z0-9\[\]]+(?:[=<>!~]=?=?[^\s,]+)?)", text)
        or re.search(
            r"Because ([-._A-Za-z0-9]+(?:[=<>!~]=?=?[^\s,]+)?) (?:has no|depends on|was yanked|requires|cannot)", text
        )
        or re.search(r"[Yy]ou require ([-._A-Za-z0-9]+(?:\[[^\]]*\])?(?:[=<>!~]=?=?[^\s,]+)?)", text)
    )
    name = subject[1].rstrip(".") if subject else ""
    metadata = {"requirement": name} if name else {}
    lead = f"The requirement {name} cannot be met." if name else "The requirements cannot be met together."
    return Failure("REQUIREMENT_UNSATISFIABLE", f"{lead} {_reasons(text)}", metadata)


def _backend(text: str) -> Failure | None:
    match = re.search(
        r"Failed to (?:build|prepare distributions|download and build)(?:[:\s]+)?`?([-._A-Za-z0-9]+(?:==[^\s`]+)?)?",
        text,
    )
    if match is None and not re.search(r"build backend returned an error|Call to `[^`]+` failed", text):
        return None
    named = re.search(r"Failed to (?:build|download and build) `([^`]+)`", text)
    name = named[1] if named else (match[1] if match and match[1] else "")
    last = [line for line in text.splitlines() if line.strip()][-1].strip() if text.strip() else ""
    error = re.search(
        r"^\s*((?:[\w.]*Error|[\w.]*Exception|error|fatal error)\b.*)$", text.split("[stderr]")[-1], re.MULTILINE
    )
    said = (error[1] if error else last).strip()
    subject = f"The requirement {name}" if name else "A requirement"
    return Failure(
        "BUILD_BACKEND_FAILED",
        f"{subject} has no wheel for this Python and platform, and building it from source failed: {_cut(said)} "
        "The build's log has all that it printed.",
        {"requirement": name} if name else {},
    )


def _missing_file(text: str) -> Failure | None:
    match = re.search(r"Distribution not found at: (\S+)", text)
    if match is None:
        return None
    name = match[1].rsplit("/", 1)[-1]
    return Failure(
        "REQUIREMENT_NOT_FOUND", f"The file {name} that a requirement names is not there.", {"requirement": name}
    )


def _invalid(text: str) -> Failure | None:
    match = re.search(r"Couldn't parse requirement in `[^`]*` at position \d+\s*(?:cause: )?(.*)", text, re.DOTALL)
    if match is None:
        return None
    lines = [line.strip() for line in match[1].splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 else ""
    return Failure(
        "REQUIREMENT_INVALID",
        f"The requirement {line!r} cannot be read: {lines[0] if lines else ''}",
        {"requirement": line},
    )


def _git(text: str) -> Failure | None:
    if "Git operation failed" not in text and "Git executable not found" not in text:
        return None
    match = re.search(r"(?:fetch|clone)[^\n]*?'(\w+://[^']+|[^']+@[^']+)'", text)
    url = _without_credentials(match[1]) if match else ""
    return Failure(
        "GIT_FAILED", f"The requirement from {url or 'a Git repository'} cannot be fetched. {_cut(text)}", {"url": url}
    )


def _flatten(text: str) -> str:
    """uv's text without the lines it draws, one cause to a line, older and newer styles alike."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(
        r"(?m)^\s*(?:warning: .*|Using Python .*|(?:Resolved|Prepared) \d+ .*"
        r"|(?:Downloading|Downloaded|Building) .*)$\n?",
        "",
        text,
    )
    text = re.sub(r"(?m)^[ ]*[×╰├│─▶]+(?:─▶)?[ ]?", "", text)
    return text.strip()


def _reasons(text: str) -> str:
    """The part of the resolver's text that gives reasons, on one line."""
    start = text.find("Because ")
    reasons = text[start:] if start >= 0 else text
    return _cut(" ".join(reasons.split()))


def _cut(text: str) -> str:
    text = _without_credentials(" ".join(text.split()))
    return text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 1] + "…"


def _without_credentials(text: str) -> str:
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1…@", text)
