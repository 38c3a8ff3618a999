"""Iris: says which species a flower is, with a model from the model store."""

import json
from math import exp, log, pi
from pathlib import Path

import bentoml


@bentoml.service
class Iris:
    """A classifier of iris flowers by four measures in centimetres."""

    model = bentoml.models.BentoModel("iris:latest")

    def __init__(self) -> None:
        text = Path(self.model.path, "classifier.json").read_text(encoding="utf-8")
        self.species: dict[str, list[list[float]]] = json.loads(text)

    @bentoml.api
    def classify(
        self, sepal_length: float, sepal_width: float, petal_length: float, petal_width: float
    ) -> dict[str, str | dict[str, float]]:
        """The most probable species, and how probable each is."""
        measures = (sepal_length, sepal_width, petal_length, petal_width)
        weights = {species: self._log_likelihood(normals, measures) for species, normals in self.species.items()}
        largest = max(weights.values())
        shares = {species: exp(weight - largest) for species, weight in weights.items()}
        whole = sum(shares.values())
        probabilities = {species: round(share / whole, 6) for species, share in shares.items()}
        found = max(probabilities, key=lambda species: probabilities[species])
        with bentoml.monitor("iris") as monitor:
            monitor.log(petal_length, name="petal_length", role="feature", data_type="numerical")
            monitor.log(found, name="species", role="prediction", data_type="categorical")
        return {"species": found, "probabilities": probabilities}

    @staticmethod
    def _log_likelihood(normals: list[list[float]], measures: tuple[float, ...]) -> float:
        return sum(
            -0.5 * log(2 * pi * variance) - (measure - mean) ** 2 / (2 * variance)
            for (mean, variance), measure in zip(normals, measures, strict=True)
        )
