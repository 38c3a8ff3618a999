"""What use cases over versions do about uses, within their transactions: tell those of a bento, refuse a delete."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from ekiben.errors import FailedPrecondition
from services.kernel.db import AsyncConnection
from services.registry.domain import Kind, Use, reported_uses
from services.registry.store import uses as rows

_SHOWN = 5


async def tell_bento(
    connection: AsyncConnection, organization: str, name: str, uid: str, models: Iterable[str], now: datetime
) -> None:
    """Write down which models a bento uses, whether or not they are there."""
    told = [Use(name, uid, model) for model in models]
    known = await rows.of_owner(connection, organization, uid)
    await rows.put(connection, organization, name, uid, reported_uses(known, told, 0, now))


async def refuse_used(
    connection: AsyncConnection, organization: str, kind: Kind, what: str, resources: Sequence[str], todo: str
) -> None:
    """Raise FailedPrecondition (MODEL_IN_USE, BENTO_IN_USE) while something uses any of `resources`.

    `what` begins the sentence ("Model 'iris:v1' is"), `todo` ends it.
    """
    users, count = await rows.live_users(connection, organization, resources, _SHOWN)
    if not count:
        return
    shown = ", ".join(users) + (f" and {count - len(users)} more" if count > len(users) else "")
    raise FailedPrecondition(
        f"{what} used by {shown}. {todo}",
        reason=f"{kind.upper()}_IN_USE",
        violations=[(user, "uses it") for user in users],
        used_by=shown,
        count=count,
    )
