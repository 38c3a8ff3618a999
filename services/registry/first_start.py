"""The first start: the organization, the admin, and the API token in the admin token's file.

The row of the token comes before the file. A crash between the two leaves a token that nobody has; at the next
start the file is missing, so that token is deleted and another one made. Each file of each machine has a token of its
own: a second machine on the same database ends nobody's. Of several registries that start at once one does this and the
others find it done; those that name no file never make a token.

A file that exists is never touched. One whose token the database does not know is its operator's choice, who has the
key of all secrets beside it: a Secret of Kubernetes that was made anew, say. That token becomes an admin's, audited;
but none that was deleted or has expired, which somebody may have seen, and who ended it meant that.
"""

import asyncio
import logging
import re
import secrets
import socket
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from ekiben.api.v1.annotations_pb2 import Role
from services.content.files import make_folder, write_whole
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.registry.accounts import new_token
from services.registry.identities import ApiToken, AuditEntry, hash_of
from services.registry.store import accounts as rows
from services.registry.store import audit

log = logging.getLogger(__name__)

_METHOD = "ekiben.identity.v1.Accounts/CreateApiToken"
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
        if not first and kept is not None and not await _is_choice(connection, kept, now, file):
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
        if user is None or user.role != Role.ROLE_ADMIN or (kept is not None and user.disabled):
            log.warning("no admin token was made: its user is no admin any more, or disabled", extra={"user": admin})
            return
        # A file that is there is an operator's choice (or older than the database): it is taken.
        value = kept if kept is not None and _FORM.fullmatch(kept) else new_token()
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
        await rows.delete_first_tokens(connection, organization, token.description, now)
        await rows.add_token(connection, organization, token, hash_of(value), first=True)
        if not first:
            await audit.add(connection, organization, [_entry(token, "taken from" if kept == value else "written to")])
    if kept != value:
        await asyncio.to_thread(_write, file, value)
        log.info("admin token made", extra={"file": str(file), "user": admin})
    elif not first:
        log.warning("the token in the admin token's file is an admin's now", extra={"file": str(file), "user": admin})


async def _is_choice(connection: AsyncConnection, kept: str, now: datetime, file: Path | None) -> bool:
    """Whether the file has a token that nobody has known yet. Says why one in it gives no way in."""
    token_hash = hash_of(kept)
    if found := await rows.by_hash(connection, token_hash):
        expired = found[1].expire_time is not None and found[1].expire_time <= now
        why = "has expired" if expired else ""
    elif await rows.is_ended(connection, token_hash):
        why = "was deleted"
    elif not _FORM.fullmatch(kept):
        why = "is none: ekb_ and 20 to 200 letters, digits, - and _"
    else:
        return True
    if why:
        log.warning(
            "nobody gets in by the token in the admin token's file; to get in by it, write another token there",
            extra={"file": str(file), "why": f"it {why}"},
        )
    return False


def _entry(token: ApiToken, how: str) -> AuditEntry:
    return AuditEntry(
        entry=secrets.token_hex(12),
        create_time=token.create_time,
        user="services/registry",
        api_token="",
        method=_METHOD,
        resource=token.name,
        outcome="OK",
        detail=f"An admin's token of users/{token.user}, {how} its file at a start. {token.description}",
        request_id="",
        trace_id="",
        peer="",
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None


def _write(path: Path, value: str) -> None:
    make_folder(path.parent)
    write_whole(path, value.encode() + b"\n", 0o600)
