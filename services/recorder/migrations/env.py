from services.kernel.migrations import run
from services.recorder.store import metadata

run(metadata)
