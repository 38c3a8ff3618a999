"""Alembic revisions of the deployer's tables; see services.kernel.migrations."""
