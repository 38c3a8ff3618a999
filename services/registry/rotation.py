"""Rotation of the key that seals secrets, while registries run.

1. A new key is put in front in the key file: from now on everything is sealed with it (a registry reads a changed
   file before it seals), and the old keys still open.
2. Each secret that is sealed with another key is sealed anew, unless somebody writes it meanwhile.
3. Old keys stay in the file until `drop_old_keys`: backups that were made before need them.

Each step can be repeated: a rotation that was killed is gone on with by the next one, without another new key.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ekiben.errors import DataLoss, FailedPrecondition
from services.content.sealing import Keys, Sealed, new_key, read_keys, write_keys
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.registry.store import secrets as rows

_BATCH = 100
_SETTLE_S = 60.0
"""A call that sealed with the key of before may commit this late: twice the deadline that clients give by default."""


@dataclass
class Rotation:
    """What a rotation did. `failures` maps names of secrets that stay as they were to why."""

    key_id: str
    resumed: bool
    resealed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    old_keys: tuple[str, ...] = ()


def _nothing() -> None:
    pass


async def rotate(database: Database, key_file: Path, *, step: Callable[[], None] = _nothing) -> Rotation:
    """Seal every secret with a new key, or go on with a rotation that was not finished.

    Args:
        step: called after each secret.

    Raises:
        FailedPrecondition: the key file is absent or unreadable (SECRETS_KEY_INVALID).
    """
    keys = await asyncio.to_thread(_read, key_file)
    async with database.read() as connection:
        used = await rows.key_ids(connection)
    resumed = any(key in used for key in list(keys)[1:])
    if not resumed:
        added = new_key()
        keys = dict([added, *keys.items()])
        await asyncio.to_thread(write_keys, key_file, keys.items())
    sealing = Keys(keys)
    rotation = Rotation(sealing.current, resumed)
    # Twice: a call that sealed with the old key just before the file changed may commit behind the first pass.
    for _ in range(2):
        await _reseal(database, sealing, rotation, step)
    rotation.old_keys = tuple(key for key in keys if key != sealing.current)
    return rotation


async def _reseal(database: Database, keys: Keys, rotation: Rotation, step: Callable[[], None]) -> None:
    after = ""
    while True:
        async with database.read() as connection:
            batch = await rows.sealed_otherwise(connection, keys.current, after, _BATCH)
        for row in batch:
            after = row.uid
            name = f"secrets/{row.secret}"
            try:
                value = keys.open(Sealed(row.key_id, row.sealed), row.uid)
            except (FailedPrecondition, DataLoss) as exc:
                rotation.failures[name] = exc.message
                continue
            sealed = keys.seal(value, row.uid)
            async with database.transaction() as connection:
                rotation.resealed += await rows.reseal(connection, row, sealed.key_id, sealed.data)
            step()
        if len(batch) < _BATCH:
            return


async def drop_old_keys(database: Database, key_file: Path, clock: Clock) -> tuple[str, ...]:
    """Take the keys that seal nothing out of the key file; their ids. The front one always stays.

    Raises:
        FailedPrecondition: secrets are sealed with an old key (SECRET_KEY_IN_USE), or the file was changed within the
            last minute (SECRET_KEY_FRESH).
    """
    keys = await asyncio.to_thread(_read, key_file)
    current, *old = keys
    age_s = clock.now().timestamp() - (await asyncio.to_thread(key_file.stat)).st_mtime
    if old and age_s < _SETTLE_S:
        raise FailedPrecondition(
            f"The key file was changed {max(0, age_s):.0f} s ago, and calls that began before may still seal with the "
            f"old key. Try again in {_SETTLE_S - max(0, age_s):.0f} s.",
            reason="SECRET_KEY_FRESH",
            path=key_file,
        )
    async with database.read() as connection:
        used = await rows.key_ids(connection)
    if held := sorted(used.keys() & set(old)):
        raise FailedPrecondition(
            f"{sum(used[key] for key in held)} secrets are sealed with {', '.join(held)}. Rotate the keys first.",
            reason="SECRET_KEY_IN_USE",
            keys=",".join(held),
        )
    if old:
        await asyncio.to_thread(write_keys, key_file, [(current, keys[current])])
    return tuple(old)


def _read(key_file: Path) -> dict[str, bytes]:
    try:
        return read_keys(key_file)
    except OSError as exc:
        raise FailedPrecondition(
            f"The key file {str(key_file)!r} cannot be read: {exc.strerror or exc}.",
            reason="SECRETS_KEY_INVALID",
            path=key_file,
        ) from exc
