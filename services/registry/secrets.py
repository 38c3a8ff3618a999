"""Use cases over secrets: write-only for people, readable for the services of the suite."""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ekiben.errors import AlreadyExists, InvalidArgument, NotFound
from services.content.sealing import Sealed, Sealing
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.kernel.identity import Principal
from services.kernel.updates import check_etag, etag_of
from services.registry.accounts import words_of
from services.registry.catalog import organization_of
from services.registry.domain import check_text
from services.registry.identities import MAX_SECRET_BYTES, MAX_SECRET_ITEMS, Secret, SecretItem
from services.registry.store import secrets as rows

MOUNT_FILE = 2
"""Number of the proto's kind for files."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,254}")


def etag(secret: Secret) -> str:
    """Changes with each change of the secret."""
    return etag_of(secret.uid, secret.revision)


class Secrets:
    """Values, sealed."""

    def __init__(self, database: Database, keys: Sealing, clock: Clock) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock

    async def get(self, caller: Principal, name: str) -> Secret:
        """One secret without its values. Raises NotFound (SECRET_NOT_FOUND)."""
        async with self._database.read() as connection:
            return _found(await rows.get(connection, organization_of(caller), name), name).secret

    async def list(self, caller: Principal, text: str, size: int, after: str) -> tuple[list[Secret], int]:
        """At most `size` secrets by name, without their values, and how many match."""
        words = words_of(text)
        async with self._database.read() as connection:
            return await rows.list_by_name(connection, organization_of(caller), words, size, after)

    async def create(self, caller: Principal, name: str, values: Mapping[str, Any]) -> Secret:
        """A new secret; `values` holds description, kind, stage, path and items.

        Raises:
            AlreadyExists: SECRET_EXISTS.
            InvalidArgument: SECRET_INVALID.
        """
        organization = organization_of(caller)
        now = self._clock.now()
        uid = str(uuid.uuid4())
        row = self._columns(uid, values)
        _check(values["kind"], values["path"], values["items"], values["description"])
        row |= {"secret": name, "uid": uid, "creator": caller.user, "create_time": now, "update_time": now}
        async with self._database.transaction() as connection:
            if not await rows.add(connection, organization, row):
                raise AlreadyExists(
                    f"Secret {name!r} exists already.", reason="SECRET_EXISTS", secret=f"secrets/{name}"
                )
            return _found(await rows.get(connection, organization, name), name).secret

    async def update(self, caller: Principal, name: str, values: Mapping[str, Any], sent_etag: str) -> Secret:
        """Change what `values` gives; `items` are replaced as a whole. Raises NotFound, Aborted, InvalidArgument."""
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            secret = _found(await rows.get(connection, organization, name, lock=True), name).secret
            check_etag(sent_etag, etag(secret))
            _check(
                values.get("kind", secret.kind),
                values.get("path", secret.path),
                values.get("items", secret.items),
                values.get("description", secret.description),
            )
            if values:
                row = self._columns(secret.uid, values) | {"update_time": self._clock.now()}
                await rows.update(connection, organization, name, row)
            return _found(await rows.get(connection, organization, name), name).secret

    async def delete(self, caller: Principal, name: str, sent_etag: str) -> None:
        """Delete a secret. Raises NotFound, Aborted (ETAG_MISMATCH)."""
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            secret = _found(await rows.get(connection, organization, name, lock=True), name).secret
            check_etag(sent_etag, etag(secret))
            await rows.delete(connection, organization, name)

    async def reveal(self, caller: Principal, names: Sequence[str]) -> Sequence[Secret]:
        """Secrets with their values, in this order. Raises NotFound for the first that is missing."""
        organization = organization_of(caller)
        async with self._database.read() as connection:
            kept = [_found(await rows.get(connection, organization, name), name) for name in names]
        return [self._opened(one) for one in kept]

    def _opened(self, kept: rows.Kept) -> Secret:
        values = json.loads(self._keys.open(Sealed(kept.key_id, kept.sealed), kept.secret.uid))
        items = [replace(item, value=value) for item, value in zip(kept.secret.items, values, strict=True)]
        return replace(kept.secret, items=items)

    def _columns(self, uid: str, values: Mapping[str, Any]) -> dict[str, Any]:
        row = {name: value for name, value in values.items() if name != "items"}
        if "items" in values:
            items: Sequence[SecretItem] = values["items"]
            sealed = self._keys.seal(json.dumps([item.value or "" for item in items]).encode(), uid)
            row["items"] = json.dumps([[item.key, item.sub_path] for item in items])
            row |= {"key_id": sealed.key_id, "sealed": sealed.data}
        return row


def _found(kept: rows.Kept | None, name: str) -> rows.Kept:
    if kept is None:
        raise NotFound(f"Secret {name!r} does not exist.", reason="SECRET_NOT_FOUND", secret=f"secrets/{name}")
    return kept


def _check(kind: int, path: str, items: Sequence[SecretItem], description: str) -> None:
    """Refuse what a replica could not be given (SECRET_INVALID)."""
    faults: list[tuple[str, str]] = []
    if not items:
        faults.append(("items", "there are none"))
    if len(items) > MAX_SECRET_ITEMS:
        faults.append(("items", f"there are more than {MAX_SECRET_ITEMS:,}"))
    if len({item.key for item in items}) < len(items):
        faults.append(("items", "a key is there twice"))
    for place, item in enumerate(items[:MAX_SECRET_ITEMS]):
        field = f"items[{place}]"
        if item.value is not None and len(item.value.encode()) > MAX_SECRET_BYTES:
            faults.append((f"{field}.value", f"more than {MAX_SECRET_BYTES:,} bytes"))
        if item.value is not None and "\0" in item.value and kind != MOUNT_FILE:
            faults.append((f"{field}.value", "a variable cannot hold the character NUL"))
        if kind == MOUNT_FILE and not _inside(item.sub_path or item.key):
            faults.append((f"{field}.sub_path", "not a path below the secret's folder"))
        if kind != MOUNT_FILE and _VARIABLE.fullmatch(item.key) is None:
            faults.append((f"{field}.key", "not the name of an environment variable"))
        if "\0" in item.key + item.sub_path:
            faults.append((f"{field}.key", "holds the character NUL"))
    if faults:
        told = "; ".join(f"{field}: {fault}" for field, fault in faults[:5])
        raise InvalidArgument(f"The secret is refused: {told}.", reason="SECRET_INVALID", violations=faults[:20])
    check_text("path", path, 4096, "SECRET_INVALID")
    check_text("description", description, 64 << 10, "SECRET_INVALID")


def _inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return (
        bool(path) and len(path) <= 4096 and not parts.is_absolute() and ".." not in parts.parts and bool(parts.parts)
    )
