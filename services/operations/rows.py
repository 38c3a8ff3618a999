"""The rows of a service as a file: JSON lines, gzipped.

{"service": "registry", "revision": "0002"}
{"table": "users", "columns": ["organization", "user_id", …]}
["default", "admin", …]                                        a row; bytes are {"base64": "…"}
{"rows": 1}                                                    the end of a table, and how many there were
{"end": true}
"""

import asyncio
import base64
import hashlib
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

from ekiben.errors import DataLoss
from services.kernel.db import AsyncConnection, Database
from services.operations.store import moving
from services.operations.store.services import tables_of

_LEVEL = 3
"""Of gzip: twice as fast as 6 for a tenth more bytes."""
_GZIP = 31
_PIECE_BYTES = 1 << 20
_INSERT = 500


class Packer:
    """Gzips what passes; then knows the digest of the result."""

    def __init__(self) -> None:
        self._gzip = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of all that `packed` gave."""
        return self._sha256.hexdigest()

    async def packed(self, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The lines as a gzip file, in pieces of about a mebibyte."""
        piece = bytearray()
        async for line in lines:
            piece += line
            if len(piece) >= _PIECE_BYTES:
                if data := await asyncio.to_thread(self._gzip.compress, bytes(piece)):
                    self._sha256.update(data)
                    yield data
                piece.clear()
        data = self._gzip.compress(bytes(piece)) + self._gzip.flush()
        self._sha256.update(data)
        yield data


async def unpacked(chunks: AsyncIterator[bytes], path: str, sha256: str) -> AsyncIterator[bytes]:
    """The lines of a gzip file; act on them only once the iteration has ended.

    Raises:
        DataLoss: it is damaged, or another file than `sha256` says (BACKUP_DAMAGED).
    """
    gzip = zlib.decompressobj(_GZIP)
    digest = hashlib.sha256()
    rest = b""
    try:
        async for chunk in chunks:
            digest.update(chunk)
            *lines, rest = (rest + gzip.decompress(chunk)).split(b"\n")
            for line in lines:
                yield line
    except zlib.error as exc:
        raise _damaged(path, str(exc)) from exc
    if digest.hexdigest() != sha256 or rest or not gzip.eof:
        raise _damaged(path, "it is not the file that was written")


async def write_rows(
    connection: AsyncConnection, service: str, revision: str, counts: dict[str, int]
) -> AsyncIterator[bytes]:
    """Lines of all rows of a service; `counts` is filled with how many each table has."""
    yield _line({"service": service, "revision": revision})
    for table in tables_of(service):
        yield _line({"table": table.name, "columns": moving.columns_of(table)})
        count = 0
        async for batch in moving.read_table(connection, table):
            count += len(batch)
            yield b"".join(_line(list(row)) for row in batch)
        counts[table.name] = count
        yield _line({"rows": count})
    yield _line({"end": True})


async def read_rows(
    database: Database, connection: AsyncConnection, lines: AsyncIterator[bytes], service: str, revision: str, path: str
) -> dict[str, int]:
    """Put the rows of a file into tables that are made anew for them, within the connection's transaction.

    Raises:
        DataLoss: the file is damaged (BACKUP_DAMAGED).
        FailedPrecondition: a newer release wrote it (DATABASE_NEWER).
    """
    tables = await moving.begin_load(database, connection, service, revision)
    counts: dict[str, int] = {}
    table, ended = "", False
    columns: list[str] = []
    rows: list[list[Any]] = []

    async def insert() -> None:
        await moving.insert_rows(connection, tables[table], columns, rows)
        counts[table] += len(rows)
        rows.clear()

    async for line in lines:
        try:
            read: Any = json.loads(line, object_hook=_bytes)
            if isinstance(read, list):
                rows.append(read)
                if len(rows) >= _INSERT:
                    await insert()
            elif "table" in read:
                table, columns, counts[read["table"]] = read["table"], read["columns"], 0
            elif "rows" in read:
                await insert()
                if counts[table] != read["rows"]:
                    raise _damaged(path, f"{table} has {counts[table]} rows of {read['rows']}")
            elif "service" in read and (read["service"], read["revision"]) != (service, revision):
                raise _damaged(path, "it is of another service or revision than snapshot.json says")
            ended = "end" in read
        except (ValueError, KeyError, TypeError) as exc:
            raise _damaged(path, f"a line cannot be read ({exc})") from exc
    if not ended:
        raise _damaged(path, "it ends early")
    await moving.end_load(database, connection, service, tables)
    return counts


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=_base64).encode() + b"\n"


def _base64(value: Any) -> dict[str, str]:
    if isinstance(value, bytes | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"a row holds a {type(value).__name__}")


def _bytes(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value


def _damaged(path: str, why: str) -> DataLoss:
    return DataLoss(
        f"{path} of the backup is damaged: {why}. Restore another snapshot.", reason="BACKUP_DAMAGED", path=path
    )
