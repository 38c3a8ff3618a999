"""A service that says on which node it runs."""

import os
import time

import bentoml

NODE = os.environ.get("NODE", "")


@bentoml.service(threads=32)
class Placed:
    @bentoml.api
    def node(self) -> str:
        return NODE

    @bentoml.api
    def think(self, seconds: float) -> str:
        time.sleep(seconds)
        return NODE
