"""Alembic revisions of the builder's tables; see services.kernel.migrations."""
