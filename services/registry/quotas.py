"""Use cases over quotas: what an organization keeps, and what it may keep."""

from collections.abc import Mapping
from dataclasses import replace

from ekiben.errors import NotFound
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.kernel.identity import Principal
from services.kernel.updates import check_etag, etag_of
from services.registry.catalog import organization_of
from services.registry.domain import Quota
from services.registry.store import quotas as rows


def etag(quota: Quota) -> str:
    """Changes with each change of the limits."""
    return etag_of(quota.organization, quota.revision)


class Quotas:
    """Limits, and counts."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def get(self, caller: Principal, organization: str) -> Quota:
        """The quota of the caller's organization; `-` names it too. Raises NotFound (ORGANIZATION_NOT_FOUND)."""
        own = _own(caller, organization)
        async with self._database.read() as connection:
            return await rows.get(connection, own)

    async def update(
        self, caller: Principal, organization: str, limits: Mapping[str, int | None], sent_etag: str
    ) -> Quota:
        """Set the limits that are given, None lifting one.

        Raises:
            NotFound: ORGANIZATION_NOT_FOUND.
            InvalidArgument: negative (QUOTA_INVALID).
            Aborted: ETAG_MISMATCH.
        """
        own = _own(caller, organization)
        async with self._database.transaction() as connection:
            before = await rows.get(connection, own, lock=True)
            check_etag(sent_etag, etag(before))
            wanted = replace(before.limits, **limits)
            wanted.check()
            if wanted == before.limits:
                return before
            await rows.set_limits(connection, own, wanted, caller.user, self._clock.now())
            return await rows.get(connection, own)


def _own(caller: Principal, organization: str) -> str:
    own = organization_of(caller)
    if organization not in ("-", own):
        raise NotFound(
            f"Organization {organization!r} does not exist.",
            reason="ORGANIZATION_NOT_FOUND",
            organization=f"organizations/{organization}",
        )
    return own
