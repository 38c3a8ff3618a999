from services.kernel.migrations import run
from services.registry.store import metadata
from services.registry.store.tables import declare_partial_indexes

declare_partial_indexes()
run(metadata)
