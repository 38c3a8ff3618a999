"""Alembic revisions of the recorder's tables."""
