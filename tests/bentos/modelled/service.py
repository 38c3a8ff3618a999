"""A service with a model of the model store."""

import json
from pathlib import Path

import bentoml


@bentoml.service
class Modelled:
    weights = bentoml.models.BentoModel("weights:latest")

    def __init__(self) -> None:
        self.factor = json.loads((Path(self.weights.path) / "weights.json").read_text())["factor"]

    @bentoml.api
    def predict(self, x: float) -> float:
        return x * self.factor
