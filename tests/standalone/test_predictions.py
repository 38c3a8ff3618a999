"""What is remembered of predictions that are made at the same time: each has what belongs to it, and only that."""

import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.platform import BentoMl, Platform, http, wait_for

CALLS = 330
AT_ONCE = 24
SERVICE = """
import time

import bentoml

image = bentoml.images.Image(python_version="3.11", lock_python_packages=False)
TIMES = {"timeout": 60}


def logged(name: str, rows: list[str]) -> None:
    with bentoml.monitor(name) as monitor:
        monitor.log_batch(rows, name="text", role="feature", data_type="categorical")


@bentoml.service(threads=8, traffic=TIMES)
class Words:
    @bentoml.api
    def one(self, text: str) -> str:
        time.sleep(0.02)
        logged("one", [text])
        return text

    @bentoml.api(batchable=True, max_batch_size=8, max_latency_ms=60_000)
    def many(self, texts: list[str]) -> list[str]:
        time.sleep(0.02)
        logged("many", texts)
        return texts


@bentoml.service(image=image, threads=8, traffic=TIMES)
class Busy:
    words = bentoml.depends(Words)

    @bentoml.api
    async def ask(self, text: str) -> str:
        return await self.words.to_async.one(text)

    @bentoml.api
    async def ask_many(self, text: str) -> str:
        return (await self.words.to_async.many([text]))[0]

    @bentoml.api(batchable=True, max_batch_size=8, max_latency_ms=60_000)
    def rate(self, texts: list[str]) -> list[str]:
        time.sleep(0.02)
        logged("rate", texts)
        return texts
"""
MONITORS = {"ask": "one", "ask_many": "many", "rate": "rate"}


@dataclass(frozen=True)
class Call:
    """One request, and what it was answered."""

    endpoint: str
    text: str
    trace: str
    status: int
    body: bytes
    prediction: str


@pytest.fixture(scope="module")
def busy(platform: Platform, bentoml: BentoMl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a bento of two services answers."""
    folder: Path = tmp_path_factory.mktemp("busy")
    (folder / "service.py").write_text(SERVICE)
    bentoml("deploy", ".", "-n", "busy", "--timeout", "300", cwd=folder, timeout_s=330)
    (url,) = platform.ekiben_json("deployments", "get", "busy")["urls"]
    yield url
    platform.ekiben("deployments", "delete", "busy", "--yes")


def call(url: str, number: int) -> Call:
    """Ask an endpoint, in a trace of its own."""
    endpoint = list(MONITORS)[number % len(MONITORS)]
    text, trace = f"text {number}", secrets.token_hex(16)
    payload: dict[str, Any] = {"texts": [text]} if endpoint == "rate" else {"text": text}
    answer = http(
        "POST",
        f"{url}/{endpoint}",
        json.dumps(payload).encode(),
        {"content-type": "application/json", "traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"},
        timeout_s=120,
    )
    return Call(endpoint, text, trace, answer.status, answer.body, answer.headers["x-request-id"])


def test_predictions_at_the_same_time_each_have_their_own_bodies_spans_and_monitored_values(
    platform: Platform, busy: str
) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        calls = list(pool.map(lambda number: call(busy, number), range(CALLS)))
    # BentoML ends the connections between services, with the calls that are on them, after each hundredth call.
    assert [found for found in calls if found.status != 200] == []

    def remembered(found: Call) -> bool:
        answers = [
            platform.api("GET", f"/v1/{name}") for name in (f"predictions/{found.prediction}", f"traces/{found.trace}")
        ]
        assert [answer.status for answer in answers] == [200, 200]
        prediction, trace = (answer.json() for answer in answers)
        logged = [(each["monitor"], json.loads(each["data"])["text"]) for each in prediction.get("monitorEntries", [])]
        assert logged == [(MONITORS[found.endpoint], found.text)]
        assert prediction["traceId"] == found.trace
        assert found.text in prediction["request"]["text"] and found.text in prediction["response"]["text"]
        servers = sorted(span["service"] for span in trace["spans"] if span["kind"] == "SERVER")
        # Of a call to another service Envoy has a span, too.
        assert servers == (["Busy", "gateway"] if found.endpoint == "rate" else ["Busy", "Words", "gateway", "gateway"])
        return True

    for found in calls:
        wait_for(f"what is remembered of {found}", partial(remembered, found), 60)
