"""Lists that a registry gives in pages.

Source: OCI distribution-spec 1.1, "Listing Tags", "Listing Referrers".
"""

from collections.abc import AsyncIterator, Mapping

from yarl import URL

from ekiben.errors import InvalidArgument
from services.content.images.registry.client import Client
from services.content.images.registry.problems import Answer

_MAX_PAGES = 10_000
_MAX_BYTES = 32 << 20
"""Of a whole list: a million tags, or a hundred thousand attachments."""


async def pages(
    client: Client, path: str, what: str, scopes: frozenset[str], headers: Mapping[str, str] | None = None
) -> AsyncIterator[Answer]:
    """Each page of a list, or the one answer that it is not there (404).

    A link that was followed before ends the list: what it leads to is known.

    Raises:
        InvalidArgument: the list is too long, or goes on for ever (MANIFEST_INVALID).
    """
    first, size = path.partition("?")[0], 0
    seen: set[str] = set()
    while path and path not in seen:
        seen.add(path)
        answer = await client.ask("GET", path, what, (200, 404), scopes, headers=headers)
        size += len(answer.body)
        if size > _MAX_BYTES or len(seen) > _MAX_PAGES:
            raise InvalidArgument(
                f"{client.location.host} was asked to {what}, and the list has no end: {size} bytes in {len(seen)} "
                "pages so far. Remove there what nobody needs; if that is little, the registry is broken.",
                reason="MANIFEST_INVALID",
            )
        yield answer
        following = answer.following if answer.status == 200 else None
        path = f"{first}?{URL(str(following)).raw_query_string}" if following is not None else ""
