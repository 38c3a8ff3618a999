"""Pipeline: tables in, tables out. Two services: one reads and writes files, the other computes."""

from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType


@bentoml.service
class Statistics:
    """Computes; it has replicas of its own and is reached by the pipeline only."""

    @bentoml.api
    def describe(self, table: np.ndarray) -> dict[str, list[float]]:
        """Mean, deviation, least and largest of each column."""
        return {
            "mean": table.mean(axis=0).tolist(),
            "deviation": table.std(axis=0).tolist(),
            "least": table.min(axis=0).tolist(),
            "largest": table.max(axis=0).tolist(),
        }

    @bentoml.api
    def normalize(self, table: np.ndarray) -> np.ndarray:
        """Each column less its mean, over its deviation; a column that never changes becomes zero."""
        deviation = table.std(axis=0)
        centred: np.ndarray = table - table.mean(axis=0)
        return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)


@bentoml.service(traffic={"timeout": 60})
class Pipeline:
    """What callers see."""

    statistics = bentoml.depends(Statistics)

    @bentoml.api
    def describe(self, table: np.ndarray) -> dict[str, list[float]]:
        """Describe an array: `{"table": [[1, 2], [3, 4]]}`."""
        return self.statistics.describe(table=np.atleast_2d(table).astype(float))

    @bentoml.api
    def normalize(self, file: Path, context: bentoml.Context) -> Annotated[Path, ContentType("text/csv")]:
        """Take a CSV file with a heading line, give one with normalized columns."""
        heading = file.read_text(encoding="utf-8").partition("\n")[0]
        table = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2)
        answer = Path(context.temp_dir) / "normalized.csv"
        np.savetxt(
            answer, self.statistics.normalize(table=table), delimiter=",", header=heading, comments="", fmt="%.6f"
        )
        return answer
