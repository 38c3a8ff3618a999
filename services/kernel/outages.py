"""What a database's errors mean to a caller: it is away, full, undecided, damaged, or not this role's to change.

Errors of constraints stay the store's to translate, and so does a mistake in a statement: it is a bug.
"""

import sqlite3

import sqlalchemy as sa

from ekiben.errors import Aborted, DataLoss, EkibenError, FailedPrecondition, ResourceExhausted, Unavailable
from services.kernel.postgres import NotConnected

# Classes and codes of PostgreSQL's (appendix A of its manual): connection, operator's intervention, resources, and a
# lock that was not had in time.
_AWAY = ("08", "57", "53", "55P03")
_LOST = ("40001", "40P01")
_READ_ONLY = "25006"
_STUCK = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class Translated:
    """A block in which a database's errors become ours; in one that writes, so does that the database takes none."""

    def __init__(self, *, writes: bool = False) -> None:
        self._writes = writes

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, exc: BaseException | None, _tb: object) -> None:
        translated = translate(exc) if isinstance(exc, Exception) else None
        if translated is None and self._writes and isinstance(exc, Exception) and _state(exc) == _READ_ONLY:
            translated = Unavailable(
                "The database takes no changes now: it is a standby. Try again.",
                reason="DATABASE_UNAVAILABLE",
                retry_after_s=1.0,
            )
        if translated is not None:
            raise translated from exc


def translate(exc: Exception) -> EkibenError | None:
    """Our error for the database's; None where it is none of these."""
    if isinstance(exc, EkibenError):
        return None
    if isinstance(exc, sa.exc.DBAPIError):
        return _of_driver(exc)
    # A connection without SQLAlchemy around it (`Database.listening`) raises the driver's own.
    if isinstance(exc, NotConnected | sa.exc.TimeoutError) or type(exc).__module__.startswith("asyncpg."):
        return _away()
    if isinstance(exc, OSError) and _from_driver(exc):
        return _away()
    return None


def at_commit(exc: Exception) -> EkibenError | None:
    """The same for an error of COMMIT itself: a connection that breaks there leaves it open what became of it."""
    translated = translate(exc)
    if not isinstance(translated, Unavailable):
        return translated
    return Aborted(
        "The database went away while the change was committed: it may have been made, or not. Read again, then redo "
        "what is missing.",
        reason="COMMIT_UNKNOWN",
    )


def cause_of(exc: EkibenError) -> str:
    """What the driver said, for an operator: a caller is told less."""
    cause = exc.__cause__
    return str(cause.orig if isinstance(cause, sa.exc.DBAPIError) else cause or exc.message)


def not_permitted(exc: Exception, where: str) -> FailedPrecondition | None:
    """The error of a role that may not make tables, or has no schema to make them in; None for any other."""
    state = _state(exc)
    if state not in ("42501", "3F000"):
        return None
    why = str(getattr(exc, "orig", exc)).partition(":")[2].strip() or str(exc)
    return FailedPrecondition(
        f"The database {where} does not let this role make its tables: {why}. Let it CREATE in the database, or make "
        "the schema for it: CREATE SCHEMA … AUTHORIZATION …; and name it in the URL: ?schema=….",
        reason="DATABASE_NOT_PERMITTED",
        database=where,
    )


def _of_driver(exc: sa.exc.DBAPIError) -> EkibenError | None:
    state = _state(exc)
    # The second: another release changed the tables under a statement that this process had prepared.
    if state in _LOST or type(exc.orig).__name__ == "InvalidCachedStatementError":
        return Aborted("Another transaction went first; try again.", reason="TRANSACTION_LOST")
    sqlite_code = getattr(exc.orig, "sqlite_errorcode", 0) & 0xFF
    no_space = state == "53100" or (state == "58030" and "No space left" in str(exc.orig))
    if no_space or sqlite_code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            "The database's disk is full; free some space.", reason="DISK_FULL", retry_after_s=30.0
        )
    if sqlite_code in _DAMAGED:
        return DataLoss("The database's file is damaged; put back a copy.", reason="DATABASE_DAMAGED")
    away = state.startswith(_AWAY) or exc.connection_invalidated
    if away or sqlite_code in _STUCK or isinstance(exc, sa.exc.InterfaceError):
        return _away()
    return None


def _state(exc: Exception) -> str:
    return str(getattr(getattr(exc, "orig", None), "sqlstate", "") or "")


def _away() -> Unavailable:
    return Unavailable("The database does not answer; try again.", reason="DATABASE_UNAVAILABLE", retry_after_s=1.0)


def _from_driver(exc: BaseException) -> bool:
    """Whether the driver raised `exc`, rather than a caller's own code within the transaction."""
    tb = exc.__traceback__
    while tb is not None:
        if tb.tb_frame.f_globals.get("__name__", "").startswith("asyncpg."):
            return True
        tb = tb.tb_next
    return False
