"""Writes docs/settings.md and docs/errors.md from the code, or with `--check` says whether they are fresh."""

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path

from services.kernel.settings import PeerSettings, ServerSettings, describe

ROOT = Path(__file__).resolve().parent.parent

SETTINGS_HEAD = """\
# Settings

Each service reads its settings once, at start, from the environment; every fault is told at once. A secret is never a value: it is a file that a setting names. Fields that hold
several values take them separated by commas. `ekiben up` works out defaults for all of them from its data directory, and a variable of the environment wins over each.

This page is made from the code by `make generate`.
"""

ERRORS_HEAD = """\
# Errors

Every error has a code, a reason and a sentence that says what to do next. Over gRPC they are the status and an `ErrorInfo` with the domain `ekiben.dev`; over HTTP a problem
(RFC 9457, `application/problem+json`) with the members `code`, `reason`, `metadata` and `violations`, whose `type` leads to this page. In Python they are classes of `ekiben`.
A reason is part of the API and is kept for ever. Every value in a sentence is also in the metadata.

| code | HTTP | class | what a caller does |
|---|---|---|---|
| INVALID_ARGUMENT | 400 | `InvalidArgument` | mend the request: `violations` says which field |
| FAILED_PRECONDITION | 400 | `FailedPrecondition` | change the state first |
| UNAUTHENTICATED | 401 | `Unauthenticated` | send a good API token |
| PERMISSION_DENIED | 403 | `PermissionDenied` | ask for a higher role |
| NOT_FOUND | 404 | `NotFound` | stop |
| ALREADY_EXISTS | 409 | `AlreadyExists` | stop |
| ABORTED | 409 | `Aborted` | read again and redo |
| RESOURCE_EXHAUSTED | 429; 507 for a full disk | `ResourceExhausted` | wait, or free something |
| CANCELLED | 499 | `Cancelled` | decide |
| INTERNAL | 500 | `Internal` | report it, with the request id |
| DATA_LOSS | 500 | `DataLoss` | page someone |
| UNIMPLEMENTED | 501 | `Unimplemented` | do without |
| UNAVAILABLE | 503 | `Unavailable` | retry this call |
| DEADLINE_EXCEEDED | 504 | `DeadlineExceeded` | decide |

## Reasons

This list is made from the code by `make generate`. A sentence is shown as it stands in the code; several places may give one reason.

"""


def settings_page() -> str:
    """Markdown of every setting of every service."""
    groups = [("Every server", ServerSettings, "EKIBEN_SERVER"), ("Where the peers are", PeerSettings, "EKIBEN_PEERS")]
    for service in ("registry", "builder", "deployer", "recorder", "gateway"):
        module = importlib.import_module(f"services.{service}.settings")
        groups.append((f"The {service}", module.Settings, f"EKIBEN_{service.upper()}"))
    lines = [SETTINGS_HEAD]
    for title, cls, prefix in groups:
        lines += [f"\n## {title}\n", "| variable | type | default | meaning |", "|---|---|---|---|"]
        for setting in describe(cls, prefix):
            default = (
                "required" if setting.default == "required" else f"`{setting.default}`" if setting.default else "empty"
            )
            lines.append(f"| `{setting.variable}` | {setting.type} | {default} | {setting.text} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def sentence(node: ast.expr) -> str:
    """The message as it stands in the code, with its dynamic parts named in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    return ""


def reasons() -> dict[str, tuple[set[str], set[str]]]:
    """Every reason with the classes and the sentences that go with it."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in sorted([*(ROOT / "ekiben").rglob("*.py"), *(ROOT / "services").rglob("*.py")]):
        if path.parent.name == "v1":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                    reason = str(keyword.value.value)
                    if not re.fullmatch(r"[A-Z][A-Z0-9_]+", reason):
                        continue
                    classes, sentences = found.setdefault(reason, (set(), set()))
                    name = ast.unparse(node.func).rpartition(".")[2]
                    if name[:1].isupper():
                        classes.add(name)
                    if node.args and (text := sentence(node.args[0])):
                        sentences.add(text)
    return found


def errors_page() -> str:
    """Markdown of every reason."""
    lines = [ERRORS_HEAD.rstrip("\n"), ""]
    for reason, (classes, sentences) in sorted(reasons().items()):
        lines.append(f"### {reason.lower().replace('_', '-')}\n")
        lines.append(
            f"`{reason}`" + (f" — {', '.join(f'`{name}`' for name in sorted(classes))}" if classes else "") + "\n"
        )
        lines += [f"- {text}" for text in sorted(sentences)]
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is not fresh")
    check = parser.parse_args().check
    stale = []
    for path, text in (("docs/settings.md", settings_page()), ("docs/errors.md", errors_page())):
        file = ROOT / path
        if not file.exists() or file.read_text() != text:
            stale.append(path)
            if not check:
                file.write_text(text)
    if check and stale:
        sys.exit(f"Not fresh; run `make generate`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
