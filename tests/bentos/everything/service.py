"""One service with each kind of endpoint that BentoML has."""

from __future__ import annotations

import time
import typing as t
from pathlib import Path

import bentoml
import numpy as np


@bentoml.service(traffic={"timeout": 60})
class Everything:
    """Echo, stream, task, files, arrays and monitoring."""

    @bentoml.api
    def echo(self, text: str) -> str:
        return text

    @bentoml.api
    def info(self, payload: dict[str, t.Any]) -> dict[str, t.Any]:
        with bentoml.monitor("inputs") as monitor:
            monitor.log(len(payload), name="keys", role="feature", data_type="numerical")
        return {"keys": sorted(payload), "count": len(payload)}

    @bentoml.api
    async def stream(self, count: int = 5) -> t.AsyncGenerator[str, None]:
        import asyncio

        for i in range(count):
            yield f"chunk {i}\n"
            await asyncio.sleep(0.2)

    @bentoml.task
    def slow(self, seconds: float = 0.2) -> str:
        time.sleep(seconds)
        return f"slept {seconds}"

    @bentoml.api
    def upload(self, file: Path) -> dict[str, t.Any]:
        data = file.read_bytes()
        return {"size": len(data), "sum": sum(data) % 65536}

    @bentoml.api
    def download(self, size: int = 1000) -> Path:
        path = Path(f"/tmp/ekiben-download-{time.time_ns()}.bin")
        path.write_bytes(bytes(i % 256 for i in range(size)))
        return path

    @bentoml.api
    def double(self, array: np.ndarray) -> np.ndarray:
        return array * 2

    @bentoml.api
    def fail(self) -> str:
        raise RuntimeError("this endpoint always fails")
