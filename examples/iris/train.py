"""Train a small classifier and keep it in the local model store as `iris`.

Gaussian naive Bayes in plain Python over the first eight flowers of each species of Fisher's iris data (1936):
nothing to install, and the model is a JSON file that anybody can read.
"""

import json
from statistics import mean, pvariance

import bentoml

# sepal length, sepal width, petal length, petal width, in centimetres
FLOWERS: dict[str, list[tuple[float, float, float, float]]] = {
    "setosa": [
        (5.1, 3.5, 1.4, 0.2),
        (4.9, 3.0, 1.4, 0.2),
        (4.7, 3.2, 1.3, 0.2),
        (4.6, 3.1, 1.5, 0.2),
        (5.0, 3.6, 1.4, 0.2),
        (5.4, 3.9, 1.7, 0.4),
        (4.6, 3.4, 1.4, 0.3),
        (5.0, 3.4, 1.5, 0.2),
    ],
    "versicolor": [
        (7.0, 3.2, 4.7, 1.4),
        (6.4, 3.2, 4.5, 1.5),
        (6.9, 3.1, 4.9, 1.5),
        (5.5, 2.3, 4.0, 1.3),
        (6.5, 2.8, 4.6, 1.5),
        (5.7, 2.8, 4.5, 1.3),
        (6.3, 3.3, 4.7, 1.6),
        (4.9, 2.4, 3.3, 1.0),
    ],
    "virginica": [
        (6.3, 3.3, 6.0, 2.5),
        (5.8, 2.7, 5.1, 1.9),
        (7.1, 3.0, 5.9, 2.1),
        (6.3, 2.9, 5.6, 1.8),
        (6.5, 3.0, 5.8, 2.2),
        (7.6, 3.0, 6.6, 2.1),
        (4.9, 2.5, 4.5, 1.7),
        (7.3, 2.9, 6.3, 1.8),
    ],
}
LEAST_VARIANCE = 0.01  # a species whose flowers all measure the same must still forgive a tenth of a centimetre


def train() -> dict[str, list[tuple[float, float]]]:
    """For each species, mean and variance of each measure."""
    return {
        species: [(mean(measure), max(pvariance(measure), LEAST_VARIANCE)) for measure in zip(*flowers, strict=True)]
        for species, flowers in FLOWERS.items()
    }


def main() -> None:
    """Train, and save to the model store."""
    count = sum(map(len, FLOWERS.values()))
    with bentoml.models.create("iris", labels={"example": "iris"}, metadata={"flowers": count}) as model:
        with open(model.path_of("classifier.json"), "w", encoding="utf-8") as out:
            json.dump(train(), out, indent=2)
    print(f"Saved {model.tag}.")


if __name__ == "__main__":
    main()
