"""The form of a backup; pure.

    VAULT/blobs/sha256/ab/abcd…               the bytes of every snapshot, each once, by their digest
    VAULT/snapshots/ID/registry.jsonl.gz      the rows of a service: see `rows.py`
    VAULT/snapshots/ID/blobs.txt.gz           a line `<hex> <size>` for each blob that the rows name
    VAULT/snapshots/ID/snapshot.json          written last: a snapshot without it is not one

The ids are times, so that they sort by age.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from ekiben.errors import DataLoss, FailedPrecondition

FORMAT = 1
BLOBS_FILE = "blobs.txt.gz"


@dataclass(frozen=True)
class Rows:
    """The rows of one service: the revision of its tables, how many rows each has, and the file's own digest."""

    revision: str
    tables: Mapping[str, int]
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """What `snapshot.json` says."""

    id: str
    create_time: str
    release: str
    services: Mapping[str, Rows]
    blob_count: int = 0
    blob_bytes: int = 0
    blobs_sha256: str = ""
    damaged: tuple[str, ...] = ()
    """Digests whose bytes were missing or damaged already: they are not in the backup."""
    format: int = FORMAT
    key_ids: tuple[str, ...] = field(default=())
    """Ids of the keys that opened the secrets; the keys themselves are not here."""

    def to_json(self) -> bytes:
        """The file's text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes, path: str) -> "Snapshot":
        """What was written.

        Raises:
            DataLoss: it is no snapshot's file (BACKUP_DAMAGED).
            FailedPrecondition: a newer release wrote it (BACKUP_NEWER).
        """
        try:
            read: dict[str, Any] = json.loads(text)
            version = int(read["format"])
            if version <= FORMAT:
                read["services"] = {name: Rows(**rows) for name, rows in read["services"].items()}
                read |= {key: tuple(read[key]) for key in ("damaged", "key_ids")}
                return cls(**read)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise DataLoss(
                f"{path} of the backup is damaged: {exc}. Take another snapshot.", reason="BACKUP_DAMAGED", path=path
            ) from exc
        raise FailedPrecondition(
            f"A newer release wrote {path}: format {version}, and this one reads up to {FORMAT}. Use that release.",
            reason="BACKUP_NEWER",
            path=path,
        )


def new_id(now: datetime, random_hex: str) -> str:
    """`20261125T142233Z-1a2b3c`."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{random_hex}"


def file_of(snapshot: str, name: str = "snapshot.json") -> str:
    """Path of a snapshot's file in its vault."""
    return f"snapshots/{snapshot}/{name}"


def blob_path(digest_hex: str) -> str:
    """Path of a blob in a vault."""
    return f"blobs/sha256/{digest_hex[:2]}/{digest_hex}"
