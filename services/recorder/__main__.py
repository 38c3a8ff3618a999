"""`python -m services.recorder`: the recorder as a process."""

from services.kernel.app import run_service
from services.recorder.app import open_recorder
from services.recorder.settings import Settings

if __name__ == "__main__":
    run_service("recorder", open_recorder, Settings)
