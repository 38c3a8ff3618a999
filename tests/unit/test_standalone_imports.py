"""What a start does not pay for."""

import subprocess
import sys

import pytest

UNWANTED = ("sqlalchemy.orm", "sqlalchemy.dialects.postgresql", "asyncpg", "alembic", "mako")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("services.standalone.app", UNWANTED),
        ("ekiben.cli", UNWANTED),
        ("services.builder.offline", (*UNWANTED, "sqlalchemy")),
    ],
)
def test_starting_imports_nothing_that_it_may_not_need(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
