"""SQLAlchemy's asyncio engines without its ORM, and INSERT without the dialect that is not in use.

`sqlalchemy.ext.asyncio` imports the ORM for sessions, which nobody here uses: a third of a second and 4 MiB in every
process, where `ekiben up` promises to be ready within three. So its module of engines is imported while the package
is there by name only, and the package is taken out again: who imports it later gets the whole of it, as ever.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "sqlalchemy.ext.asyncio" in sys.modules:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
else:
    _spec = importlib.util.find_spec("sqlalchemy.ext.asyncio")
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    try:
        from sqlalchemy.ext.asyncio.engine import AsyncConnection, AsyncEngine, create_async_engine
        from sqlalchemy.util import concurrency

        concurrency._concurrency_shim._initialize()  # the last line of the package's own __init__
    finally:
        del sys.modules[_spec.name]

__all__ = ["AsyncConnection", "AsyncEngine", "create_async_engine", "insert_into"]


def insert_into(dialect: str, table: Any) -> Any:
    """An INSERT that knows ON CONFLICT, of the dialect of this name.

    Imported here: PostgreSQL's alone takes a tenth of a second, which a start on SQLite can do without.
    """
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)
