"""HTTP beside gRPC: an aiohttp application at one of the suite's addresses."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.kernel.settings import SettingsError

if TYPE_CHECKING:
    from aiohttp import web


@asynccontextmanager
async def serve_app(app: "web.Application", address: str, *, setting: str, **options: Any) -> AsyncIterator[str]:
    """Serve at `host:port` or `unix:/path` while inside; gives the address with the port that was taken.

    A Unix socket is this user's only, and one that a killed process left is replaced.

    Args:
        setting: what names the address, for the error.
        options: of aiohttp's AppRunner.

    Raises:
        SettingsError: it is no such address, or cannot be listened on.
    """
    from aiohttp import web  # here, because a process without HTTP does without it

    runner = web.AppRunner(app, access_log=None, **options)
    await runner.setup()
    try:
        site: web.BaseSite
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            site = web.UnixSite(runner, str(path))
        else:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise SettingsError([f"{setting}: {address!r} is neither host:port nor unix:/path."])
            site = web.TCPSite(runner, host.strip("[]"), int(port))
        try:
            await site.start()
        except (OSError, OverflowError) as exc:
            raise SettingsError([f"{setting}: cannot listen on {address}: {_why(exc)}."]) from exc
        if address.startswith("unix:"):
            path.chmod(0o600)
            yield address
        else:
            yield f"{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _why(exc: Exception) -> str:
    return (isinstance(exc, OSError) and exc.strerror) or str(exc)
