"""The first start: the organization, the admin, and the API token in the admin token's file.

The row of the token comes before the file. A crash between the two leaves a token that nobody has; at the next
start the file is missing, so that token is deleted and another one made. Each file of each machine has a token of its
own: a second machine on the same database ends nobody's. A file that exists is never touched, even where its token was
deleted on purpose. Of several registries that start at once one does this and the others find it
done; those that name no file never make a token.
"""

import asyncio
import logging
import re
import secrets
import socket
import uuid
from pathlib import Path
from typing import Any

from ekiben.api.v1.annotations_pb2 import Role
from services.content.files import make_folder, write_whole
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.registry.accounts import new_token
from services.registry.identities import ApiToken, hash_of
from services.registry.store import accounts as rows

log = logging.getLogger(__name__)

_FORM = re.compile(r"ekb_[A-Za-z0-9_-]{20,200}")


async def ensure_admin(
    database: Database, clock: Clock, *, organization: str, admin: str, admin_token_file: Path | None
) -> None:
    """Make what a new registry needs, and the admin's token when its file is missing."""
    async with database.alone("first start"):  # with the file: two would each make a token, and one file holds both
        await _ensure_admin(database, clock, organization, admin, admin_token_file)


async def _ensure_admin(database: Database, clock: Clock, organization: str, admin: str, file: Path | None) -> None:
    kept = await asyncio.to_thread(_read, file) if file is not None else None
    now = clock.now()
    async with database.transaction() as connection:
        await rows.add_organization(connection, organization, str(uuid.uuid4()), now)
        await rows.lock_organization(connection, organization)
        first = not await rows.any_user(connection, organization)
        if not first and kept is not None:
            return
        if first:
            row: dict[str, Any] = {
                "user_id": admin,
                "uid": str(uuid.uuid4()),
                "email": "",
                "first_name": "",
                "last_name": "",
            }
            row |= {"role": int(Role.ROLE_ADMIN), "disabled": False, "create_time": now, "update_time": now}
            await rows.add_user(connection, organization, row)
        if file is None:
            return
        user = await rows.user(connection, organization, admin)
        if user is None or user.role != Role.ROLE_ADMIN:
            log.warning("no admin token was made: its user is no admin any more", extra={"user": admin})
            return
        # On a first start a file that is there is an operator's choice (or older than the database): it is taken.
        value = kept if first and kept is not None and _FORM.fullmatch(kept) else new_token()
        token = ApiToken(
            api_token=secrets.token_hex(8),
            user=admin,
            display_name="admin-token",
            description=f"Kept in {file} on {socket.gethostname()}.",
            role=int(Role.ROLE_ADMIN),
            scopes=(),
            create_time=now,
            expire_time=None,
            last_use_time=None,
        )
        await rows.delete_first_tokens(connection, organization, token.description)
        await rows.add_token(connection, organization, token, hash_of(value), first=True)
    if kept != value:
        await asyncio.to_thread(_write, file, value)
    log.info("admin token made", extra={"file": str(file), "user": admin})


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None


def _write(path: Path, value: str) -> None:
    make_folder(path.parent)
    write_whole(path, value.encode() + b"\n", 0o600)
