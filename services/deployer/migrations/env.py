"""What Alembic runs; see services.kernel.migrations."""

from services.deployer.store import metadata
from services.kernel.migrations import run

run(metadata)
