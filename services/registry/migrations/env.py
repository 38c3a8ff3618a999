from services.kernel.migrations import run
from services.registry.store import metadata

run(metadata)
