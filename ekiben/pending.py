"""What this machine remembers of uploads that did not end, so that `--resume` finds them again: a small file each.

    ~/.local/state/ekiben/uploads/<hash of server and resource>.json        ($XDG_STATE_HOME goes before ~/.local/state)

It is a hint and nothing more. What has arrived the registry says, and whether it was right its digest does: a file
that is lost costs time, one that is wrong costs another push.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_KEPT = 1000
"""Files that are kept at most; the oldest go."""


@dataclass(frozen=True)
class Pending:
    """An upload that began."""

    resource: str
    upload: str
    """Its name at the registry: `uploads/{upload}`."""
    part_bytes: int
    fingerprint: str
    """Of the archive: another one means other bytes, which must not be joined with those that were sent."""
    digest: str = ""
    """`sha256:<hex>` of the archive, once that is known."""


def folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where the files are."""
    base = Path(env["XDG_STATE_HOME"]) if env.get("XDG_STATE_HOME") else Path("~/.local/state").expanduser()
    return base / "ekiben" / "uploads"


def load(server: str, resource: str) -> Pending | None:
    """What is remembered of an upload to a resource of a server; None where nothing (readable) is."""
    try:
        return Pending(**json.loads(_path(server, resource).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def save(server: str, pending: Pending) -> None:
    """Remember, by writing whole and renaming. A disk that does not take it is no reason to give the upload up."""
    path = _path(server, pending.resource)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _forget_oldest(path.parent)
        new.write_text(json.dumps(asdict(pending)), encoding="utf-8")
        new.replace(path)


def forget(server: str, resource: str) -> None:
    """The upload ended."""
    with contextlib.suppress(OSError):
        _path(server, resource).unlink()


def _path(server: str, resource: str) -> Path:
    return folder() / f"{hashlib.sha256(f'{server} {resource}'.encode()).hexdigest()[:32]}.json"


def _forget_oldest(base: Path) -> None:
    kept = list(base.iterdir())
    if len(kept) > _KEPT:
        for path in sorted(kept, key=lambda path: path.stat().st_mtime)[: len(kept) - _KEPT]:
            path.unlink(missing_ok=True)
