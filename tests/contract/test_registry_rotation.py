"""Rotation of the key that seals secrets, on both databases: nothing is lost, whenever it is killed."""

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition
from services.content.sealing import KeyFile, open_key_file, read_keys
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.identity import Principal
from services.registry import rotation
from services.registry.app import MIGRATIONS
from services.registry.identities import SecretItem
from services.registry.rotation import drop_old_keys, rotate
from services.registry.secrets import Secrets
from services.registry.signing import Signer
from services.registry.store import secrets as rows

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)


class Crash(BaseException):
    """The process was killed here."""


@dataclass
class Vault:
    database: Database
    file: Path
    keys: KeyFile
    secrets: Secrets

    async def values(self) -> dict[str, str]:
        found, _ = await self.secrets.list(ME, "", 1000, "")
        opened = await self.secrets.reveal(ME, [secret.secret for secret in found])
        return {secret.secret: secret.items[0].value or "" for secret in opened}

    async def used(self) -> dict[str, int]:
        async with self.database.read() as connection:
            return await rows.key_ids(connection)


@pytest.fixture
async def vault(database_url: str, tmp_path: Path, manual_clock: ManualClock) -> AsyncIterator[Vault]:
    async with open_database(database_url) as database:
        await database.migrate(MIGRATIONS)
        keys = open_key_file(tmp_path / "secrets.key", may_make=True)
        vault = Vault(database, tmp_path / "secrets.key", keys, Secrets(database, keys, manual_clock))
        for number in range(5):
            await write(vault, f"s{number}")
        yield vault


async def write(vault: Vault, name: str) -> None:
    item = SecretItem("KEY", "", f"value of {name}")
    await vault.secrets.create(ME, name, {"description": "", "kind": 1, "stage": 1, "path": "", "items": [item]})


def wait_a_minute(vault: Vault, clock: ManualClock) -> None:
    written = clock.now() - timedelta(minutes=2)
    os.utime(vault.file, (written.timestamp(), written.timestamp()))


async def test_every_secret_is_sealed_anew_and_stays_what_it_was(vault: Vault, manual_clock: ManualClock) -> None:
    before, revision = await vault.values(), (await vault.secrets.get(ME, "s1")).revision
    (old,) = read_keys(vault.file)
    url = Signer(vault.keys.signing_keys).sign("PUT", "/blobs/uploads/u/1", manual_clock.now() + timedelta(hours=1))
    done = await rotate(vault.database, vault.file)
    assert (done.resealed, done.resumed, done.old_keys, done.failures) == (5, False, (old,), {})
    # The registry that runs has not been told anything.
    assert await vault.values() == before
    assert await vault.used() == {done.key_id: 5}
    assert (await vault.secrets.get(ME, "s1")).revision == revision
    await write(vault, "later")
    assert await vault.used() == {done.key_id: 6}
    path, _, query = url.partition("?")
    expires, signature = (part.partition("=")[2] for part in query.split("&"))
    Signer(vault.keys.signing_keys).check("PUT", path, expires, signature, manual_clock.now())
    wait_a_minute(vault, manual_clock)
    assert await drop_old_keys(vault.database, vault.file, manual_clock) == (old,)
    assert list(read_keys(vault.file)) == [done.key_id]
    assert await vault.values() == before | {"later": "value of later"}


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_rotation_that_is_killed_is_gone_on_with(vault: Vault, manual_clock: ManualClock, after: int) -> None:
    before = await vault.values()
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            raise Crash

    with pytest.raises(Crash):
        await rotate(vault.database, vault.file, step=step if after else _crash(vault))
    assert await vault.values() == before
    wait_a_minute(vault, manual_clock)
    with pytest.raises(FailedPrecondition, match="Rotate the keys first"):
        await drop_old_keys(vault.database, vault.file, manual_clock)
    keys = list(read_keys(vault.file))
    assert len(keys) == 2
    done = await rotate(vault.database, vault.file)
    assert (done.resumed, done.key_id, done.resealed) == (True, keys[0], 5 - after)
    assert list(read_keys(vault.file)) == keys
    assert await vault.values() == before


def _crash(vault: Vault) -> Callable[[], None]:
    """Crash between the new file and the first secret."""
    real, calls = rotation._reseal, []

    async def crash(*_: object) -> None:
        calls.append(1)
        rotation._reseal = real
        raise Crash

    rotation._reseal = crash
    return lambda: None


async def test_secrets_that_are_written_meanwhile_keep_what_was_written(vault: Vault) -> None:
    written = []

    real = rows.reseal

    async def late(connection: object, row: rows.SealedRow, key_id: str, sealed: bytes) -> bool:
        if row.secret == "s3" and not written:
            written.append(1)
            # In the transaction that would seal it anew: somebody else was first.
            changed = vault.keys.seal(b'["changed"]', row.uid)
            await rows.update(connection, "default", "s3", {"key_id": changed.key_id, "sealed": changed.data})  # type: ignore[arg-type]
        return await real(connection, row, key_id, sealed)  # type: ignore[arg-type]

    rows.reseal = late
    try:
        done = await rotate(vault.database, vault.file)
    finally:
        rows.reseal = real
    assert done.resealed == 4
    assert (await vault.values())["s3"] == "changed"
    assert await vault.used() == {done.key_id: 5}


async def test_a_secret_that_cannot_be_opened_is_told_and_left(vault: Vault) -> None:
    async with vault.database.transaction() as connection:
        await rows.update(connection, "default", "s2", {"key_id": "gone"})
    done = await rotate(vault.database, vault.file)
    assert list(done.failures) == ["secrets/s2"]
    assert "'gone' is not in the key file" in done.failures["secrets/s2"]
    assert await vault.used() == {done.key_id: 4, "gone": 1}


async def test_the_old_key_stays_for_a_minute(vault: Vault, manual_clock: ManualClock) -> None:
    await rotate(vault.database, vault.file)
    os.utime(vault.file, (manual_clock.now().timestamp() - 10,) * 2)
    with pytest.raises(FailedPrecondition, match="Try again in 50 s"):
        await drop_old_keys(vault.database, vault.file, manual_clock)
    assert len(read_keys(vault.file)) == 2


async def test_a_key_file_that_is_damaged_while_the_registry_runs_changes_nothing(vault: Vault) -> None:
    before = await vault.values()
    good = vault.file.read_bytes()
    vault.file.write_text("nonsense")
    assert await vault.values() == before
    await write(vault, "more")
    vault.file.write_bytes(good)
    assert len(await vault.values()) == 6
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        await rotate(vault.database, vault.file.with_name("absent"))
