"""Alembic's entry."""

from services.builder.store import metadata
from services.kernel.migrations import run

run(metadata)
