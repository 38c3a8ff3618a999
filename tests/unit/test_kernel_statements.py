"""How a statement is named and shown in a trace."""

import pytest

from services.kernel.telemetry import _shown

COLUMNS = ", ".join(f"versions.column_{i}" for i in range(30))


@pytest.mark.parametrize(
    ("statement", "name", "shown"),
    [
        ("SELECT a FROM users WHERE b = ?", "SELECT users", "SELECT a FROM users WHERE b = ?"),
        (
            f"SELECT {COLUMNS}, (SELECT u.x \nFROM uploads AS u) AS ')' \nFROM versions \nWHERE id = ?",
            "SELECT versions",
            "SELECT … FROM versions \nWHERE id = ?",
        ),
        (f"SELECT {COLUMNS}", "SELECT", f"SELECT {COLUMNS}"),
        ('INSERT INTO "users" (a) VALUES (?)', "INSERT users", 'INSERT INTO "users" (a) VALUES (?)'),
        ("PRAGMA freelist_count", "PRAGMA", "PRAGMA freelist_count"),
        ("", "SQL", ""),
        ("SELECT " + "1 + " * 900 + "1", "SELECT", ("SELECT " + "1 + " * 900)[:2000]),
    ],
)
def test_conditions_are_shown_rather_than_columns(statement: str, name: str, shown: str) -> None:
    assert (_shown(statement)[0], _shown(statement)[2]) == (name, shown)
