"""A service that cannot start."""

import bentoml


@bentoml.service
class Crashing:
    def __init__(self) -> None:
        raise ValueError("the weights are missing: expected weights.bin beside service.py")

    @bentoml.api
    def predict(self, text: str) -> str:
        return text
