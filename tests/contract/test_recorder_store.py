"""The recorder's store keeps its promises on SQLite and PostgreSQL alike."""

import asyncio
import dataclasses
import json
import random
import re

import pytest
from sqlalchemy import event

from services.kernel.db import Database, open_database
from services.recorder import domain
from services.recorder.domain import MonitorEntry, PredictionFilter, StatusFilter, TraceFilter
from services.recorder.store import PredictionStore, TraceStore, UsageStore, Writer, metadata
from tests.fixtures_recorder import NOW_US, prediction, recorder_database, span

__all__ = ["recorder_database"]

EVERYTHING = PredictionFilter("default")


@pytest.fixture
def predictions(recorder_database: Database) -> PredictionStore:
    return PredictionStore(recorder_database, Writer(recorder_database))


@pytest.fixture
def traces(recorder_database: Database) -> TraceStore:
    return TraceStore(recorder_database, Writer(recorder_database))


async def ids(store: PredictionStore, wanted: PredictionFilter) -> list[str]:
    return [row.prediction.id for row in await store.page(wanted, before=None, limit=100, bodies=False)]


async def test_migrations_give_the_tables_of_the_store(recorder_database: Database) -> None:
    assert await recorder_database.schema_differences("services.recorder.migrations", metadata) == []


async def test_a_prediction_comes_back_as_it_was_recorded(predictions: PredictionStore) -> None:
    assert await predictions.add([prediction(1)], NOW_US) == 1
    assert await predictions.get("default", "p1") == prediction(1)
    assert await predictions.get("other", "p1") is None
    assert await predictions.get("default", "p2") is None


async def test_recording_twice_keeps_the_first(predictions: PredictionStore) -> None:
    assert await predictions.add([prediction(1), prediction(1, status=500), prediction(2)], NOW_US) == 2
    assert await predictions.add([prediction(2, status=500), prediction(3)], NOW_US + 1) == 1
    assert await predictions.add([prediction(3)], NOW_US + 2) == 0
    assert await ids(predictions, EVERYTHING) == ["p3", "p2", "p1"]
    assert {
        row.prediction.status for row in await predictions.page(EVERYTHING, before=None, limit=9, bodies=False)
    } == {200}


async def test_more_predictions_than_a_statement_takes_parameters(predictions: PredictionStore) -> None:
    batch = [prediction(number) for number in range(2500)]
    assert await predictions.add(batch, NOW_US) == 2500
    assert await predictions.add(batch, NOW_US) == 0


async def test_filters(predictions: PredictionStore) -> None:
    await predictions.add(
        [
            prediction(1, status=200),
            prediction(2, status=503),
            prediction(3, status=500, deployment="deployments/other"),
            prediction(4, status=404),
            prediction(5, status=500),
            prediction(6, organization="other", status=500),
        ],
        NOW_US,
    )
    of = dataclasses.replace
    assert await ids(predictions, of(EVERYTHING, status=StatusFilter.parse("5xx"))) == ["p5", "p3", "p2"]
    assert await ids(predictions, of(EVERYTHING, status=StatusFilter.parse("500"))) == ["p5", "p3"]
    iris = of(EVERYTHING, deployment="deployments/iris")
    assert await ids(predictions, iris) == ["p5", "p4", "p2", "p1"]
    assert await ids(predictions, of(iris, status=StatusFilter.parse("5xx"))) == ["p5", "p2"]
    assert await ids(predictions, of(EVERYTHING, trace_id=f"{4:032x}")) == ["p3"]
    second = 1_000_000
    window = of(EVERYTHING, start_time_us=NOW_US + 2 * second, end_time_us=NOW_US + 4 * second)
    assert await ids(predictions, window) == ["p3", "p2"]
    assert await ids(predictions, of(window, status=StatusFilter.parse("2xx"))) == []


async def test_pages_give_each_prediction_once_also_of_equal_times(predictions: PredictionStore) -> None:
    batch = [prediction(n, start_time_us=NOW_US + n // 5, status=random.choice([500, 502, 503])) for n in range(57)]
    await predictions.add(batch, NOW_US)
    for status in (None, StatusFilter.parse("5xx")):
        seen: list[str] = []
        before = None
        while rows := await predictions.page(
            PredictionFilter("default", status=status), before=before, limit=7, bodies=False
        ):
            seen += [row.prediction.id for row in rows]
            before = rows[-1].prediction.start_time_us, rows[-1].sequence
            await predictions.add([prediction(1000 + len(seen))], NOW_US)  # newer ones move nothing
        assert sorted(seen) == sorted(each.id for each in batch)


async def test_lists_are_without_bodies_unless_asked(predictions: PredictionStore) -> None:
    await predictions.add([prediction(1)], NOW_US)
    (light,) = await predictions.page(EVERYTHING, before=None, limit=9, bodies=False)
    assert (light.prediction.request.body, light.prediction.request.headers) == (b"", {})
    assert light.prediction.request.body_size_bytes == 8
    (full,) = await predictions.page(EVERYTHING, before=None, limit=9, bodies=True)
    assert full.prediction == prediction(1)


async def test_what_was_added_after_a_sequence_comes_once_and_in_order(predictions: PredictionStore) -> None:
    await predictions.add([prediction(9)], NOW_US)
    sequence = await predictions.last_sequence()
    await predictions.add([prediction(3), prediction(2, status=500)], NOW_US - 5)  # the clock went back
    await predictions.add([prediction(1)], NOW_US + 5)
    rows, after = await predictions.after(EVERYTHING, sequence, limit=2, bodies=False)
    assert [row.prediction.id for row in rows] == ["p3", "p2"]
    rows, end = await predictions.after(EVERYTHING, after, limit=2, bodies=True)
    assert [row.prediction for row in rows] == [prediction(1)]
    assert await predictions.after(EVERYTHING, end, limit=2, bodies=False) == ([], end)
    failed = PredictionFilter("default", status=StatusFilter.parse("5xx"))
    rows, _ = await predictions.after(failed, sequence, limit=9, bodies=False)
    assert [row.prediction.id for row in rows] == ["p2"]


async def test_an_emptied_log_does_not_give_sequences_again(predictions: PredictionStore) -> None:
    await predictions.add([prediction(1)], NOW_US)
    sequence = await predictions.last_sequence()
    assert await predictions.forget_before(sequence + 1, 10) == 1
    await predictions.add([prediction(2)], NOW_US + 1)
    assert [row.prediction.id for row in (await predictions.after(EVERYTHING, sequence, limit=9, bodies=False))[0]] == [
        "p2"
    ]


async def test_monitor_entries_lie_beside_the_prediction_of_their_trace(predictions: PredictionStore) -> None:
    mine = MonitorEntry("default", "iris", NOW_US * 1000, f"{2:032x}", '{"x":1}', "deployments/iris")
    unknown = dataclasses.replace(mine, deployment="", time_ns=NOW_US * 1000 + 1)
    elsewhere = dataclasses.replace(mine, deployment="deployments/other")
    foreign = dataclasses.replace(mine, organization="other")
    # Equal ones of one call are two records; a second call with the same is a repetition.
    assert await predictions.add_monitor_entries([mine, mine, unknown, elsewhere, foreign], NOW_US) == 5
    assert await predictions.add_monitor_entries([mine, mine, unknown], NOW_US + 5) == 0
    await predictions.add([prediction(1)], NOW_US)
    found = await predictions.get("default", "p1")
    assert found is not None
    assert list(found.monitor_entries) == [mine, mine, unknown]


async def test_of_a_trace_with_several_predictions_each_has_its_own_monitor_entries(
    predictions: PredictionStore, traces: TraceStore
) -> None:
    trace = f"{1:032x}"
    await predictions.add([prediction(number, trace_id=trace) for number in (0, 1, 2)], NOW_US)
    # The caller's span 1; for each prediction the gateway's, a replica's, and below that a call to another service.
    asked = [span(10 + number, 1, attributes={"ekiben.request_id": f"p{number}"}) for number in (0, 1)]
    served = [span(20 + number, 10 + number, service="Iris") for number in (0, 1)]
    between = [span(30 + number, 20 + number, attributes={"ekiben.request_id": f"q{number}"}) for number in (0, 1)]
    behind = [span(40 + number, 30 + number, service="Words") for number in (0, 1)]
    await traces.add([*asked, *served, *between, *behind, span(50, 51), span(51, 50)], NOW_US)

    def entry(name: str, span_id: object) -> MonitorEntry:
        data = json.dumps({"name": name, "request_id": span_id})
        return MonitorEntry("default", "m", NOW_US * 1000, trace, data, "deployments/iris")

    logged = [entry("a", "20"), entry("b", "21"), entry("c", "40"), entry("d", "41")]
    unknown = [entry("e", "99"), entry("f", "None"), entry("g", "50")]
    await predictions.add_monitor_entries([*logged, *unknown], NOW_US)
    for number, names in ((0, "acefg"), (1, "bdefg"), (2, "efg")):
        found = await predictions.get("default", f"p{number}")
        assert found is not None
        assert "".join(json.loads(each.data)["name"] for each in found.monitor_entries) == names


async def test_forgetting_takes_the_oldest_and_their_bodies(
    predictions: PredictionStore, recorder_database: Database
) -> None:
    await predictions.add([prediction(n) for n in range(5)], NOW_US)
    await predictions.add([prediction(n) for n in range(5, 8)], NOW_US + 60_000_000)
    assert await predictions.forget_before(NOW_US + 60_000_000, 3) == 3
    assert await predictions.forget_before(NOW_US + 60_000_000, 3) == 2
    assert await predictions.forget_before(NOW_US + 60_000_000, 3) == 0
    assert await ids(predictions, EVERYTHING) == ["p7", "p6", "p5"]
    async with recorder_database.read() as connection:
        bodies = await connection.exec_driver_sql("SELECT count(*) FROM prediction_bodies")
        assert bodies.scalar() == 3
    usage = UsageStore(recorder_database)
    assert [minute for minute, _ in await usage.oldest("predictions", 9)] == [NOW_US // 60_000_000 + n for n in (0, 1)]
    await usage.forget_before("predictions", NOW_US // 60_000_000 + 1)
    (_, size), total = (await usage.oldest("predictions", 9))[0], await usage.totals()
    assert total == {"predictions": size}
    assert size > 3 * 700


async def test_a_trace_sums_up_whatever_the_order_of_arrival(traces: TraceStore) -> None:
    spans = [span(1), span(2, 1, service="registry"), span(3, 2, error=True), span(4, 2), span(5, 4, service="sql")]
    for seed in range(12):
        order = [dataclasses.replace(each, trace_id=f"{seed + 10:032x}") for each in spans]
        random.Random(seed).shuffle(order)
        batches = [order[:2], order[1:3], order[3:], order]  # with repetitions
        for batch in batches:
            await traces.add(batch, NOW_US)
        found = await traces.get("default", f"{seed + 10:032x}")
        assert found is not None
        summary, kept = found
        assert [each.span_id for each in kept] == [each.span_id for each in spans]
        assert (summary.root, summary.span_count, summary.error_count) == ("span 1", 5, 1), seed
        assert (summary.start_ns, summary.end_ns) == (spans[0].start_ns, spans[4].end_ns)
        assert summary.services == {"gateway", "registry", "sql"}
        (listed,) = [
            each
            for each in await traces.page(TraceFilter("default"), before=None, limit=50)
            if each.trace_id == summary.trace_id
        ]
        assert listed == summary


async def test_the_root_is_the_earliest_span_whose_parent_is_not_there(traces: TraceStore) -> None:
    await traces.add([span(5, 4), span(6, 5)], NOW_US)
    await traces.add([span(3, 2)], NOW_US)
    assert (await traces.page(TraceFilter("default"), before=None, limit=1))[0].root == "span 3"
    await traces.add([span(2, 1, start_ms=30)], NOW_US)  # a parent whose clock is behind
    assert (await traces.page(TraceFilter("default"), before=None, limit=1))[0].root == "span 5"
    await traces.add([span(4, 2)], NOW_US)
    assert (await traces.page(TraceFilter("default"), before=None, limit=1))[0].root == "span 2"


@pytest.mark.parametrize("short", [64, 2])
async def test_many_traces_whose_roots_come_last_and_twice(
    traces: TraceStore, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `short` decides how the store looks at what is there: at whole traces, or at the spans that were asked for.
    monkeypatch.setattr("services.recorder.store.traces._SHORT", short)
    several = [
        (number, organization) for number in range(1, 520) for organization in ("default", "other")[: number % 3]
    ]
    steps = [
        [span(3, 2, trace=number, organization=owner, service="registry") for number, owner in several],
        [span(4, 3, trace=number, organization=owner, error=number == 7) for number, owner in several],
        [span(2, 1, trace=number, organization=owner, start_ms=9) for number, owner in several],
        [span(1, trace=number, organization=owner) for number, owner in several],
    ]
    for batch in steps:
        assert (await traces.add(batch, NOW_US)).recorded == len(batch)
        assert (await traces.add(batch[:550], NOW_US)).recorded == 0
    for number, owner in ((1, "default"), (7, "default"), (518, "default"), (518, "other")):
        found = await traces.get(owner, f"{number:032x}")
        assert found is not None
        summary, spans = found
        assert (summary.root, summary.span_count, summary.error_count) == ("span 1", 4, int(number == 7))
        assert (summary.start_ns, summary.services) == (spans[0].start_ns, {"gateway", "registry"})
    assert await traces.get("other", f"{1:032x}") is None


async def test_traces_are_listed_newest_first_and_filtered(traces: TraceStore) -> None:
    await traces.add([span(1, trace=n, start_ms=n * 1000, service="gateway") for n in range(1, 8)], NOW_US)
    await traces.add([span(2, 1, trace=3, start_ms=3500, service="registry", error=True)], NOW_US)
    await traces.add([span(2, trace=2, start_ms=9000, service="registry")], NOW_US)
    await traces.add([span(9, trace=99, organization="other")], NOW_US)

    async def listed(**filters: object) -> list[int]:
        wanted = TraceFilter("default", **filters)  # type: ignore[arg-type]
        seen: list[int] = []
        before = None
        while page := await traces.page(wanted, before=before, limit=2):
            seen += [int(each.trace_id, 16) for each in page]
            before = page[-1].start_ns, page[-1].trace_id
        return seen

    assert await listed() == [7, 6, 5, 4, 3, 2, 1]
    assert await listed(service="registry") == [3, 2]
    assert await listed(errors_only=True) == [3]
    assert await listed(errors_only=True, service="gateway") == [3]
    assert await listed(start_ns=NOW_US * 1000 + 6_000_000_000) == [7, 6]
    # A span that came late and began earlier moves its trace, in every list.
    await traces.add([span(8, trace=3, start_ms=500)], NOW_US)
    assert await listed() == [7, 6, 5, 4, 2, 1, 3]
    assert await listed(service="registry") == [2, 3]


async def test_a_trace_takes_a_limited_number_of_spans(traces: TraceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain, "MAX_SPANS_PER_TRACE", 5)
    assert await traces.add([span(n, 1) for n in range(1, 5)], NOW_US) == (4, 0)
    assert await traces.add([span(n, 1) for n in range(3, 9)], NOW_US) == (1, 3)
    assert await traces.add([span(n, 1) for n in range(1, 6)], NOW_US) == (0, 0)
    found = await traces.get("default", f"{1:032x}")
    assert found is not None
    assert (found[0].span_count, len(found[1])) == (5, 5)


async def test_forgetting_traces_takes_those_that_nothing_was_added_to(traces: TraceStore) -> None:
    await traces.add([span(1, trace=n) for n in range(1, 4)], NOW_US)
    await traces.add([span(2, 1, trace=2)], NOW_US + 10)
    assert await traces.forget_before(NOW_US + 5, 100) == 2
    assert [each.trace_id for each in await traces.page(TraceFilter("default"), before=None, limit=9)] == [f"{2:032x}"]
    assert await traces.get("default", f"{1:032x}") is None


async def test_every_filter_of_a_list_walks_an_index_in_the_order_of_the_list(
    predictions: PredictionStore, traces: TraceStore, recorder_database: Database
) -> None:
    if recorder_database.dialect != "sqlite":
        pytest.skip("PostgreSQL plans by statistics, and scans what is small")
    await predictions.add([prediction(n, status=200 + n) for n in range(5)], NOW_US)
    await traces.add([span(n, trace=n) for n in range(1, 5)], NOW_US)
    statements: list[tuple[str, tuple[object, ...]]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: tuple[object, ...], *_: object) -> None:
        statements.append((statement, parameters))

    every = (
        EVERYTHING,
        PredictionFilter("default", "deployments/iris"),
        PredictionFilter("default", status=StatusFilter.parse("2xx")),
        PredictionFilter("default", "deployments/iris", status=StatusFilter.parse("200")),
        PredictionFilter("default", trace_id=f"{1:032x}"),
        PredictionFilter("default", start_time_us=NOW_US, end_time_us=NOW_US + 5),
    )
    async with recorder_database.read() as connection:
        event.listen(connection.sync_connection.engine, "before_cursor_execute", note)  # type: ignore[union-attr]
    for wanted in every:
        for bodies in (False, True):
            await predictions.page(wanted, before=(NOW_US + 9, 5), limit=2, bodies=bodies)
    for filters in ({}, {"service": "gateway"}, {"errors_only": True}, {"service": "gateway", "errors_only": True}):
        await traces.page(TraceFilter("default", **filters), before=(NOW_US, "f"), limit=2)  # type: ignore[arg-type]
    await predictions.after(EVERYTHING, 5, limit=9, bodies=True)
    await predictions.get("default", "p1")
    await traces.get("default", f"{1:032x}")
    assert len(statements) > 20
    async with recorder_database.read() as connection:
        for statement, parameters in statements:
            if statement.startswith("SELECT"):
                plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                steps = "; ".join(row[3] for row in plan)
                sorted_on_purpose = "FROM spans" in statement or "FROM monitor_entries" in statement
                assert not re.search(r"SCAN (?!(\d+ )?CONSTANT)", steps), (statement, steps)
                assert "TEMP B-TREE" not in steps or sorted_on_purpose, (statement, steps)


async def test_a_tail_misses_nothing_of_writers_beside_one_another(
    predictions: PredictionStore, recorder_database: Database, database_url: str
) -> None:
    async with open_database(database_url) as second:
        other = PredictionStore(second, Writer(second))
        written = 0

        async def write(store: PredictionStore, first: int) -> None:
            nonlocal written
            for start in range(first, first + 100, 5):
                added = await store.add([prediction(n) for n in range(start, start + 5)], NOW_US)
                written += added

        async def read() -> list[str]:
            seen: list[str] = []
            sequence = 0
            while not (written == 400 and len(seen) >= 400):
                rows, sequence = await predictions.after(EVERYTHING, sequence, limit=7, bodies=False)
                seen += [row.prediction.id for row in rows]
            return seen

        async with asyncio.timeout(60):
            seen, *_ = await asyncio.gather(
                read(),
                *(
                    write(store, first)
                    for store, first in zip([predictions, other] * 2, range(0, 400, 100), strict=True)
                ),
            )
        assert sorted(seen) == sorted(f"p{n}" for n in range(400))
