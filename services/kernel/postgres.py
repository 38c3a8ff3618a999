"""PostgreSQL's side of `db`: what a URL may say, how a connection is made, and what its refusal means.

    postgresql://user@host:5432/name?schema=ekiben_registry&sslmode=verify-full&sslrootcert=/etc/ca.pem

The parameters are libpq's (`sslmode`, `sslcert`, `service`, `passfile`, `target_session_attrs`, several hosts, …), and
so are the variables `PGPASSFILE`, `PGPASSWORD`, `PGSERVICEFILE` and their kin; `schema` is ours. What libpq does not
know is a setting of the server's for each connection, such as `statement_timeout`.
"""

import asyncio
import logging
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from services.kernel.settings import SettingsError

if TYPE_CHECKING:
    import asyncpg

log = logging.getLogger(__name__)

SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg")

# A server that does not answer for so long is as good as away; whoever waits for a connection is told then.
_CONNECT_S = 10.0
# A machine that vanished shows within about a minute: 30 s of silence, then three questions.
_KEEPALIVE_S, _KEEPALIVE_EVERY_S, _KEEPALIVE_TRIES = 30, 10, 3
# Unquoted, so that psql and people need no quotes either; PostgreSQL cuts longer names off.
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_SECRET = ("password", "sslpassword")


class NotConnected(Exception):
    """PostgreSQL cannot be reached, or lets nobody in; the text is a sentence for the operator. It has no secret."""


@dataclass(frozen=True)
class Address:
    """Where a database is, and how to get in."""

    dsn: str
    """For asyncpg. It may hold a password: never show it."""
    shown: str
    """The URL for people: without a password."""
    schema: str = ""
    """The schema that holds the tables; empty for the role's own search path."""
    password_file: Path | None = None


def parse(url: str, password_file: Path | None = None) -> Address:
    """What `url` says. Raises SettingsError; its text shows no password."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise SettingsError(["database_url: it is no URL of a database."]) from None
    schema = dict(query).get("schema", "")
    if schema and not _SCHEMA.fullmatch(schema):
        raise SettingsError(
            [f"database_url: schema={schema} cannot be used: it must be of a-z, 0-9 and _, at most 63, no digit first."]
        )
    if password_file is not None and (":" in parts.netloc.rpartition("@")[0] or "password" in dict(query)):
        raise SettingsError(["database_password_file and a password in database_url exclude one another."])
    given = [(key, value) for key, value in query if key != "schema"]
    dsn = urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(given), ""))
    return Address(dsn, redacted(url), schema, password_file)


def redacted(url: str) -> str:
    """`url` without its password, whatever its form."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    if ":" in user:
        user = user.partition(":")[0] + ":***"
    kept = [(key, "***" if key in _SECRET else value) for key, value in parse_qsl(parts.query, keep_blank_values=True)]
    query = urlencode(kept, safe="/*:,", quote_via=quote)
    return urlunsplit((parts.scheme, f"{user}{at}{hosts}", parts.path, query, ""))


def with_schema(url: str, schema: str) -> str:
    """`url`, its tables in `schema`; one that names a schema itself gets `<its own>_<schema>`'s last word."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    query["schema"] = f"{query.get('schema') or 'ekiben'}_{schema}"
    return urlunsplit(parts._replace(query=urlencode(query, safe="/:,", quote_via=quote)))


class Connector:
    """Makes connections, and logs once when it no longer can, and once when it can again."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._failing = ""

    async def __call__(self) -> "asyncpg.Connection[Any]":
        """A connection. Raises NotConnected."""
        try:
            connection = await self._connect()
        except NotConnected as exc:
            if str(exc) != self._failing:
                self._failing = str(exc)
                log.warning("database cannot be reached", extra={"cause": self._failing})
            raise
        if self._failing:
            self._failing = ""
            log.warning("database is reached again", extra={"database": self._address.shown})
        return connection

    async def _connect(self) -> "asyncpg.Connection[Any]":
        import asyncpg  # a start on SQLite does without

        where, options = self._address.shown, dict[str, Any]()
        if self._address.password_file is not None:
            # Read anew for each connection: who rotates the password restarts nothing.
            options["password"] = await asyncio.to_thread(_password_in, self._address.password_file)
        settings = {"application_name": "ekiben"}
        if self._address.schema:
            settings["search_path"] = self._address.schema
        try:
            connection = await asyncpg.connect(
                self._address.dsn, timeout=_CONNECT_S, server_settings=settings, **options
            )
        except asyncpg.PostgresError as exc:
            why = str(exc).partition("\n")[0].rstrip(".")  # DETAIL and HINT stand below
            raise NotConnected(_refusal(where, exc.sqlstate or "", why)) from exc
        except ssl.SSLError as exc:
            raise NotConnected(
                f"The database {where} cannot be trusted: {exc.reason or exc}. Check sslmode and sslrootcert, and that "
                "its certificate names the host."
            ) from exc
        except TimeoutError as exc:
            raise NotConnected(f"The database {where} does not answer within {_CONNECT_S:.0f} s.") from exc
        except OSError as exc:
            raise NotConnected(
                f"The database {where} does not answer: {exc.strerror or exc}. Start PostgreSQL, or mend the URL."
            ) from exc
        except (asyncpg.InterfaceError, ValueError) as exc:  # a parameter that contradicts another, a missing file
            raise NotConnected(f"The database {where} cannot be dialled: {exc}.") from exc
        _keep_alive(connection)
        return connection


def _refusal(where: str, state: str, why: str) -> str:
    if state.startswith("28"):
        return (
            f"The database {where} lets this user not in: {why}. Check the user, and the password in PGPASSFILE, "
            "PGPASSWORD or database_password_file."
        )
    if state == "3D000":
        return f"The database {where} does not exist: {why}. Create it: createdb, or CREATE DATABASE."
    if state == "53300":
        return (
            f"The database {where} has no connection left: {why}. Raise its max_connections, or lower "
            "database_connections of the services."
        )
    return f"The database {where} does not answer: {why}."


def _password_in(path: Path) -> str:
    try:
        return path.read_text().rstrip("\n")
    except OSError as exc:
        raise NotConnected(f"The password of the database cannot be read from {path}: {exc.strerror}.") from exc


def _keep_alive(connection: "asyncpg.Connection[Any]") -> None:
    """Have the kernel ask a silent server whether it is there; asyncpg has no setting for it."""
    transport = getattr(connection, "_transport", None)
    endpoint = transport.get_extra_info("socket") if transport is not None else None
    if endpoint is None or endpoint.family == socket.AF_UNIX:
        return
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_S),
        ("TCP_KEEPINTVL", _KEEPALIVE_EVERY_S),
        ("TCP_KEEPCNT", _KEEPALIVE_TRIES),
    ):
        if hasattr(socket, option):
            endpoint.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
