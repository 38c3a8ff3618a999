"""Organizations, users, API tokens and logins as rows."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from ekiben.api.v1.annotations_pb2 import Role
from services.kernel.db import AsyncConnection, Executor, insert_into
from services.registry.identities import ApiToken, Organization, User
from services.registry.store.tables import api_tokens, ended_tokens, logins, organizations, users


async def organization(connection: AsyncConnection, name: str) -> Organization | None:
    """One organization, or None."""
    statement = sa.select(organizations).where(organizations.c.organization == name)
    row = (await connection.execute(statement)).first()
    return None if row is None else Organization(row.organization, row.uid, row.description, row.create_time)


async def add_organization(connection: AsyncConnection, name: str, uid: str, now: datetime) -> None:
    """Insert an organization, unless it is there."""
    statement = insert_into(connection.dialect.name, organizations).values(
        organization=name, uid=uid, description="", create_time=now
    )
    await connection.execute(statement.on_conflict_do_nothing(index_elements=[organizations.c.organization]))


async def lock_organization(connection: AsyncConnection, name: str) -> None:
    """Let one transaction at a time decide about the organization's admins."""
    statement = sa.select(organizations.c.uid).where(organizations.c.organization == name).with_for_update()
    await connection.execute(statement)


# Users


def _user(row: sa.Row[Any]) -> User:
    return User(
        user=row.user_id,
        uid=row.uid,
        email=row.email,
        first_name=row.first_name,
        last_name=row.last_name,
        role=row.role,
        disabled=row.disabled,
        create_time=row.create_time,
        update_time=row.update_time,
        revision=row.revision,
    )


async def user(connection: AsyncConnection, organization: str, name: str) -> User | None:
    """One user, or None."""
    statement = sa.select(users).where(users.c.organization == organization, users.c.user_id == name)
    row = (await connection.execute(statement)).first()
    return None if row is None else _user(row)


async def list_users(connection: AsyncConnection, organization: str, size: int, after: str) -> list[User]:
    """At most `size` users by name, from beyond `after`."""
    statement = (
        sa.select(users)
        .where(users.c.organization == organization, users.c.user_id > after)
        .order_by(users.c.user_id)
        .limit(size)
    )
    return [_user(row) for row in (await connection.execute(statement)).all()]


async def add_user(connection: AsyncConnection, organization: str, values: Mapping[str, Any]) -> bool:
    """Insert a user; False when there is one of this name."""
    statement = insert_into(connection.dialect.name, users).values(organization=organization, revision=1, **values)
    statement = statement.on_conflict_do_nothing(index_elements=[users.c.organization, users.c.user_id])
    return (await connection.execute(statement.returning(users.c.uid))).first() is not None


async def update_user(connection: AsyncConnection, organization: str, name: str, values: Mapping[str, Any]) -> None:
    """Write columns and count the revision up."""
    where = (users.c.organization == organization, users.c.user_id == name)
    await connection.execute(users.update().where(*where).values(**values, revision=users.c.revision + 1))


async def delete_user(connection: AsyncConnection, organization: str, name: str, now: datetime) -> None:
    """Delete a user, with tokens and approved logins."""
    here = (logins.c.organization == organization, logins.c.user_id == name)
    await connection.execute(logins.delete().where(*here))
    await _end_tokens(connection, now, api_tokens.c.organization == organization, api_tokens.c.user_id == name)
    await connection.execute(users.delete().where(users.c.organization == organization, users.c.user_id == name))


async def other_admins(connection: AsyncConnection, organization: str, name: str) -> int:
    """How many admins there are who can log in, beside this user."""
    statement = (
        sa.select(sa.func.count())
        .select_from(users)
        .where(
            users.c.organization == organization,
            users.c.user_id != name,
            users.c.role == int(Role.ROLE_ADMIN),
            sa.not_(users.c.disabled),
        )
    )
    return int((await connection.execute(statement)).scalar_one())


async def any_user(connection: AsyncConnection, organization: str) -> bool:
    """Whether the organization has users: whether this is not the first start."""
    statement = sa.select(users.c.uid).where(users.c.organization == organization).limit(1)
    return (await connection.execute(statement)).first() is not None


# API tokens


def _token(row: sa.Row[Any]) -> ApiToken:
    return ApiToken(
        api_token=row.api_token,
        user=row.user_id,
        display_name=row.display_name,
        description=row.description,
        role=row.role,
        scopes=json.loads(row.scopes),
        create_time=row.create_time,
        expire_time=row.expire_time,
        last_use_time=row.last_use_time,
    )


async def add_token(
    connection: AsyncConnection, organization: str, token: ApiToken, token_hash: str, *, first: bool = False
) -> None:
    """Insert a token by the hash of its value."""
    await connection.execute(
        api_tokens.insert().values(
            organization=organization,
            api_token=token.api_token,
            user_id=token.user,
            token_hash=token_hash,
            display_name=token.display_name,
            description=token.description,
            role=token.role,
            scopes=json.dumps(list(token.scopes)),
            first=first,
            create_time=token.create_time,
            expire_time=token.expire_time,
        )
    )


async def _end_tokens(connection: AsyncConnection, now: datetime, *which: sa.ColumnElement[bool]) -> int:
    """Delete tokens, and keep their hashes; how many there were."""
    ended = (await connection.execute(api_tokens.delete().where(*which).returning(api_tokens.c.token_hash))).scalars()
    if found := [{"token_hash": token_hash, "end_time": now} for token_hash in ended]:
        statement = insert_into(connection.dialect.name, ended_tokens)
        keep = statement.on_conflict_do_nothing(index_elements=[ended_tokens.c.token_hash])
        await connection.execute(keep, found)
    return len(found)


async def is_ended(connection: AsyncConnection, token_hash: str) -> bool:
    """Whether there was a token of this hash that was deleted."""
    statement = sa.select(ended_tokens.c.end_time).where(ended_tokens.c.token_hash == token_hash)
    return (await connection.execute(statement)).first() is not None


async def delete_first_tokens(connection: AsyncConnection, organization: str, description: str, now: datetime) -> None:
    """Delete the tokens that were made for one admin token's file, by the description that names it."""
    mine = (api_tokens.c.organization == organization, api_tokens.c.first, api_tokens.c.description == description)
    await _end_tokens(connection, now, *mine)


_BY_HASH = (
    sa.select(
        api_tokens,
        *(users.c[name].label(f"owner_{name}") for name in ("uid", "email", "first_name", "last_name", "role")),
        *(users.c[name].label(f"owner_{name}") for name in ("disabled", "create_time", "update_time", "revision")),
    )
    .join(users, sa.and_(users.c.organization == api_tokens.c.organization, users.c.user_id == api_tokens.c.user_id))
    .where(api_tokens.c.token_hash == sa.bindparam("token_hash"))
)


async def by_hash(connection: Executor, token_hash: str) -> tuple[str, ApiToken, User] | None:
    """Organization, token and user of a token's hash, or None."""
    row = (await connection.execute(_BY_HASH, {"token_hash": token_hash})).first()
    if row is None:
        return None
    owner = User(
        user=row.user_id,
        uid=row.owner_uid,
        email=row.owner_email,
        first_name=row.owner_first_name,
        last_name=row.owner_last_name,
        role=row.owner_role,
        disabled=row.owner_disabled,
        create_time=row.owner_create_time,
        update_time=row.owner_update_time,
        revision=row.owner_revision,
    )
    return row.organization, _token(row), owner


async def token(connection: AsyncConnection, organization: str, name: str) -> ApiToken | None:
    """One token, or None."""
    statement = sa.select(api_tokens).where(api_tokens.c.organization == organization, api_tokens.c.api_token == name)
    row = (await connection.execute(statement)).first()
    return None if row is None else _token(row)


async def list_tokens(
    connection: AsyncConnection,
    organization: str,
    owner: str | None,
    words: list[str],
    size: int,
    before: int | None,
) -> tuple[list[tuple[int, ApiToken]], int]:
    """At most `size` tokens, newest first, each with its row id, and how many match in all."""
    where: list[sa.ColumnElement[bool]] = [api_tokens.c.organization == organization]
    if owner is not None:
        where.append(api_tokens.c.user_id == owner)
    for word in words:
        places = (api_tokens.c.display_name, api_tokens.c.description)
        where.append(sa.or_(*(place.icontains(word, autoescape=True) for place in places)))
    counted = sa.select(sa.func.count()).select_from(api_tokens).where(*where)
    total = int((await connection.execute(counted)).scalar_one())
    if before is not None:
        where.append(api_tokens.c.id < before)
    statement = sa.select(api_tokens).where(*where).order_by(api_tokens.c.id.desc()).limit(size)
    return [(row.id, _token(row)) for row in (await connection.execute(statement)).all()], total


async def delete_token(connection: AsyncConnection, organization: str, name: str, now: datetime) -> bool:
    """Delete a token; False when there is none."""
    which = (api_tokens.c.organization == organization, api_tokens.c.api_token == name)
    return await _end_tokens(connection, now, *which) == 1


async def touch_tokens(connection: AsyncConnection, uses: Mapping[str, datetime]) -> None:
    """Note when tokens were last used."""
    for name, moment in sorted(uses.items()):
        await connection.execute(api_tokens.update().where(api_tokens.c.api_token == name).values(last_use_time=moment))


# Logins


async def add_login(
    connection: AsyncConnection, organization: str, code_hash: str, now: datetime, expire_time: datetime
) -> None:
    """Insert a login that waits for approval."""
    await connection.execute(
        logins.insert().values(
            code_hash=code_hash,
            organization=organization,
            user_id="",
            role=int(Role.ROLE_UNSPECIFIED),
            create_time=now,
            expire_time=expire_time,
        )
    )


async def count_logins(connection: AsyncConnection) -> int:
    """How many logins are kept."""
    return int((await connection.execute(sa.select(sa.func.count()).select_from(logins))).scalar_one())


async def approve_login(
    connection: AsyncConnection, organization: str, code_hash: str, user_id: str, role: int, now: datetime
) -> datetime | None:
    """Approve a login, once; its expire time, or None when there is no such login that waits."""
    statement = (
        logins.update()
        .where(
            logins.c.code_hash == code_hash,
            logins.c.organization == organization,
            logins.c.user_id == "",
            logins.c.expire_time > now,
        )
        .values(user_id=user_id, role=role)
        .returning(logins.c.expire_time)
    )
    expire_time: datetime | None = (await connection.execute(statement)).scalar_one_or_none()
    return expire_time


async def take_login(connection: AsyncConnection, code_hash: str, now: datetime) -> tuple[str, str, int] | None:
    """Take an approved login away: organization, user and role. None when there is none, or not yet approved."""
    statement = (
        logins.delete()
        .where(logins.c.code_hash == code_hash, logins.c.user_id != "", logins.c.expire_time > now)
        .returning(logins.c.organization, logins.c.user_id, logins.c.role)
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else (row.organization, row.user_id, row.role)


async def login_waits(connection: AsyncConnection, code_hash: str, now: datetime) -> bool:
    """Whether a login waits for approval."""
    statement = sa.select(logins.c.code_hash).where(
        logins.c.code_hash == code_hash, logins.c.user_id == "", logins.c.expire_time > now
    )
    return (await connection.execute(statement)).first() is not None


async def forget_logins(connection: AsyncConnection, now: datetime) -> None:
    """Delete logins whose time is over."""
    await connection.execute(logins.delete().where(logins.c.expire_time <= now))
