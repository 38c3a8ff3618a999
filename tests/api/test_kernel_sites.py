"""HTTP at the suite's addresses, and the token that a request carries."""

from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from services.kernel.identity import token_of
from services.kernel.settings import SettingsError
from services.kernel.sites import serve_app
from tests.fixtures_kernel import short_path

__all__ = ["short_path"]


def app() -> web.Application:
    """Says hello."""

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    made = web.Application()
    made.router.add_get("/", hello)
    return made


async def test_a_unix_socket_is_its_users_only_and_replaces_a_stale_one(short_path: Path) -> None:
    socket = short_path / "made" / "s.sock"
    socket.parent.mkdir()
    socket.touch()
    async with serve_app(app(), f"unix:{socket}", setting="x") as address:
        assert address == f"unix:{socket}"
        assert socket.stat().st_mode & 0o777 == 0o600
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session:
            async with session.get("http://x/") as answer:
                assert await answer.text() == "hello"


async def test_a_port_that_was_taken_is_told(short_path: Path) -> None:
    async with serve_app(app(), "127.0.0.1:0", setting="x") as address:
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/") as answer:
            assert await answer.text() == "hello"
        with pytest.raises(SettingsError, match=f"blobs_listen: cannot listen on {address}"):
            async with serve_app(app(), address, setting="blobs_listen"):
                pass


@pytest.mark.parametrize("address", ["", "nonsense", ":1", "host:", "127.0.0.1:99999", "http://x:1/"])
async def test_what_is_no_address_is_a_wrong_setting(address: str) -> None:
    with pytest.raises(SettingsError, match="listen"):
        async with serve_app(app(), address, setting="listen"):
            pass


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, ""),
        ({"authorization": "Bearer  ekb_a "}, "ekb_a"),
        ({"authorization": "bearer ekb_a", "x-yatai-api-token": "ekb_b"}, "ekb_a"),
        ({"authorization": "Basic eA==", "x-yatai-api-token": "ekb_b"}, "ekb_b"),
        ({"authorization": "Bearer "}, ""),
        ({"authorization": "Bearer ekb_\udcff"}, "?"),
        ({"x-yatai-api-token": "ekb_\x7f"}, "?"),
    ],
)
def test_the_token_of_a_request(headers: dict[str, str], token: str) -> None:
    assert token_of(headers) == token
