"""A service that says it is not ready while a file is there, and ends when it is told to."""

import os
import signal
from pathlib import Path

import bentoml

SULKING = Path("/tmp/sulking")


@bentoml.service(threads=4)
class Moody:
    def __is_ready__(self) -> bool:
        return not SULKING.exists()

    @bentoml.api
    def sulk(self) -> str:
        SULKING.touch()
        return "hm"

    @bentoml.api
    def leave(self) -> None:
        print("I leave", flush=True)
        os.kill(1, signal.SIGTERM)  # The supervisor, so that it is the container that ends.
