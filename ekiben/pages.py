"""Page tokens as `async for`."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

PAGE_SIZE = 200
"""Items asked for at once: large enough that few lists need a second call, small enough to answer quickly."""


async def items(
    method: Callable[[Any], Awaitable[Any]],
    request: Any,
    field: str,
    *,
    limit: int = 0,
) -> AsyncIterator[Any]:
    """Give each item of a List method, page after page, in the server's order.

    `field` names the repeated field of the response. `limit` ends after so many items, 0 gives all.
    `request` is changed while the iteration runs.
    """
    given = 0
    while True:
        request.page_size = min(PAGE_SIZE, limit - given) if limit else PAGE_SIZE
        page = await method(request)
        for item in getattr(page, field):
            yield item
            given += 1
            if limit and given >= limit:
                return
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
