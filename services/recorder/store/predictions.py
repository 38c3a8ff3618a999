"""The prediction log and the monitor entries in SQL."""

import heapq
import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, delete, func, insert, or_, select
from sqlalchemy import Row as SqlRow

from services.kernel.db import AsyncConnection, Database
from services.recorder.domain import (
    MAX_SPANS_PER_TRACE,
    MonitorEntry,
    Payload,
    Prediction,
    PredictionFilter,
    asker_of,
)
from services.recorder.store.tables import monitor_entries, prediction_bodies, predictions, spans
from services.recorder.store.writes import PREDICTIONS, Writer, add_usage

# Rows of an IN list. SQLite takes 32,766 parameters, PostgreSQL 65,535.
_CHUNK = 1000
# What a row costs besides its bodies and headers: columns and index entries, as measured on SQLite.
_ROW_BYTES = 700
# Of a prediction; more than anybody reads.
_MOST_ENTRIES = 1000
# The attribute by which a span of the gateway says whose it is.
_REQUEST = "ekiben.request_id"


class Row(NamedTuple):
    """A prediction and its place in the log."""

    sequence: int
    prediction: Prediction


class PredictionStore:
    """Adds to the prediction log, pages through it, follows it, and forgets."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    async def add(self, batch: Sequence[Prediction], now_us: int) -> int:
        """Add those of `batch` that are not there yet, in one transaction; how many were new.

        Raises:
            ResourceExhausted, Unavailable: no space, or no database; nothing was added (see Writer).
        """
        first = {(prediction.organization, prediction.id): prediction for prediction in reversed(batch)}
        async with self._writer.transaction(PREDICTIONS) as connection:
            for organization in {organization for organization, _ in first}:
                ids = [id_ for owner, id_ in first if owner == organization]
                for chunk in _chunks(ids):
                    known = select(predictions.c.prediction).where(
                        predictions.c.organization == organization, predictions.c.prediction.in_(chunk)
                    )
                    for (id_,) in await connection.execute(known):
                        del first[organization, id_]
            if not first:
                return 0
            sequence = await _next_sequence(connection, predictions.c.sequence, now_us)
            # Oldest first: `first` was filled from the end.
            new = list(enumerate(reversed(first.values()), start=sequence))
            bodies = [_body_row(number, prediction) for number, prediction in new]
            await connection.execute(insert(predictions), [_row(number, prediction) for number, prediction in new])
            await connection.execute(insert(prediction_bodies), bodies)
            await add_usage(connection, PREDICTIONS, now_us, sum(map(_size, bodies)) + _ROW_BYTES * len(bodies))
            return len(new)

    async def add_monitor_entries(self, entries: Sequence[MonitorEntry], now_us: int) -> int:
        """Add those entries that are not there yet, in one transaction; how many were new.

        Equal entries inside one call are all kept: `log_batch` of equal values gives such. A second call with the same
        entries adds none.
        """
        seen: dict[bytes, int] = {}
        by_fingerprint: dict[bytes, MonitorEntry] = {}
        for entry in entries:
            content = _fingerprint(entry, 0)
            seen[content] = ordinal = seen.get(content, -1) + 1
            by_fingerprint[content if ordinal == 0 else _fingerprint(entry, ordinal)] = entry
        async with self._writer.transaction(PREDICTIONS) as connection:
            for chunk in _chunks(list(by_fingerprint)):
                known = select(monitor_entries.c.fingerprint).where(monitor_entries.c.fingerprint.in_(chunk))
                for (fingerprint,) in await connection.execute(known):
                    del by_fingerprint[bytes(fingerprint)]
            if not by_fingerprint:
                return 0
            sequence = await _next_sequence(connection, monitor_entries.c.sequence, now_us)
            rows = [
                {
                    "sequence": number,
                    "organization": entry.organization,
                    "fingerprint": fingerprint,
                    "monitor": entry.monitor,
                    "time_ns": entry.time_ns,
                    "trace_id": entry.trace_id,
                    "deployment": entry.deployment,
                    "data": entry.data,
                }
                for number, (fingerprint, entry) in enumerate(by_fingerprint.items(), start=sequence)
            ]
            await connection.execute(insert(monitor_entries), rows)
            size = sum(len(entry.data) for entry in by_fingerprint.values()) + 300 * len(rows)
            await add_usage(connection, PREDICTIONS, now_us, size)
            return len(rows)

    async def get(self, organization: str, id_: str) -> Prediction | None:
        """One prediction with its bodies and the monitor entries of its trace; None where there is none."""
        query = _with_bodies().where(predictions.c.organization == organization, predictions.c.prediction == id_)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
            if row is None:
                return None
            return _prediction(row, await _entries_of(connection, row))

    async def page(
        self, wanted: PredictionFilter, *, before: tuple[int, int] | None, limit: int, bodies: bool
    ) -> list[Row]:
        """At most `limit` predictions by (start time, sequence), newest first, from before the position `before`."""
        async with self._database.read() as connection:
            if wanted.status is None:
                statuses: list[int | None] = [None]
            else:
                statuses = list(await _statuses(connection, wanted))
            pages = []
            for status in statuses:
                query = _matching(_with_bodies() if bodies else select(predictions), wanted, status)
                if before is not None:
                    query = query.where(_before(*before))
                query = query.order_by(predictions.c.start_time_us.desc(), predictions.c.sequence.desc()).limit(limit)
                pages.append(list(await connection.execute(query)))
        rows = heapq.merge(*pages, key=lambda row: (row.start_time_us, row.sequence), reverse=True)
        return [Row(row.sequence, _prediction(row)) for _, row in zip(range(limit), rows, strict=False)]

    async def after(
        self, wanted: PredictionFilter, sequence: int, *, limit: int, bodies: bool
    ) -> tuple[list[Row], int]:
        """What was added after `sequence`, in that order, and the sequence to go on from.

        Looks at no more than `limit` rows, so the list may be empty while the sequence moves on; at the end of the log
        both stay as they are.
        """
        query = (_with_bodies() if bodies else select(predictions)).where(predictions.c.sequence > sequence)
        query = query.order_by(predictions.c.sequence).limit(limit)
        async with self._database.read() as connection:
            rows = list(await connection.execute(query))
        found = [
            Row(row.sequence, _prediction(row))
            for row in rows
            if row.organization == wanted.organization
            and wanted.deployment in ("", row.deployment)
            and (wanted.status is None or row.status in wanted.status)
        ]
        return found, rows[-1].sequence if rows else sequence

    async def last_sequence(self) -> int:
        """Where the log ends now; 0 when it is empty."""
        async with self._database.read() as connection:
            return await connection.scalar(select(func.max(predictions.c.sequence))) or 0

    async def forget_before(self, sequence: int, limit: int) -> int:
        """Forget at most `limit` predictions, and as many monitor entries, written before `sequence`; how many went."""
        forgotten = 0
        async with self._database.transaction() as connection:
            old = select(predictions.c.sequence).where(predictions.c.sequence < sequence)
            chosen = [n for (n,) in await connection.execute(old.order_by(predictions.c.sequence).limit(limit))]
            if chosen:
                # A range, not a list: the rows are neighbours, and no limit of parameters applies.
                await connection.execute(delete(prediction_bodies).where(prediction_bodies.c.sequence <= chosen[-1]))
                await connection.execute(delete(predictions).where(predictions.c.sequence <= chosen[-1]))
                forgotten += len(chosen)
            old = select(monitor_entries.c.sequence).where(monitor_entries.c.sequence < sequence)
            chosen = [n for (n,) in await connection.execute(old.order_by(monitor_entries.c.sequence).limit(limit))]
            if chosen:
                await connection.execute(delete(monitor_entries).where(monitor_entries.c.sequence <= chosen[-1]))
                forgotten += len(chosen)
        return forgotten


def _with_bodies() -> Select[Any]:
    joined = predictions.join(prediction_bodies, prediction_bodies.c.sequence == predictions.c.sequence)
    bodies = [column for column in prediction_bodies.c if column.name != "sequence"]
    return select(predictions, *bodies).select_from(joined)


def _matching(query: Select[Any], wanted: PredictionFilter, status: int | None) -> Select[Any]:
    query = query.where(predictions.c.organization == wanted.organization)
    if wanted.deployment:
        query = query.where(predictions.c.deployment == wanted.deployment)
    if wanted.revision:
        query = query.where(predictions.c.revision == wanted.revision)
    if status is not None:
        query = query.where(predictions.c.status == status)
    if wanted.trace_id:
        query = query.where(predictions.c.trace_id == wanted.trace_id)
    if wanted.start_time_us is not None:
        query = query.where(predictions.c.start_time_us >= wanted.start_time_us)
    if wanted.end_time_us is not None:
        query = query.where(predictions.c.start_time_us < wanted.end_time_us)
    return query


def _before(start_time_us: int, sequence: int) -> ColumnElement[bool]:
    # The first term alone bounds the walk along the index; planners do not see it in the OR.
    return and_(
        predictions.c.start_time_us <= start_time_us,
        or_(predictions.c.start_time_us < start_time_us, predictions.c.sequence < sequence),
    )


async def _statuses(connection: AsyncConnection, wanted: PredictionFilter) -> list[int]:
    """The statuses of a class that the log holds, found by hops along the index, one hop for each.

    A class is a handful of statuses. One walk for each of them, merged, costs about the page it gives; a range of
    statuses in one query would cost a walk over, or a sort of, all that match.
    """
    assert wanted.status is not None
    lowest, highest = wanted.status.lowest, wanted.status.highest
    if lowest == highest:
        return [lowest]
    found: list[int] = []
    while lowest <= highest:
        query = select(func.min(predictions.c.status)).where(
            predictions.c.organization == wanted.organization, predictions.c.status.between(lowest, highest)
        )
        if wanted.deployment:
            query = query.where(predictions.c.deployment == wanted.deployment)
        status = await connection.scalar(query)
        if status is None:
            break
        found.append(status)
        lowest = status + 1
    return found


async def _entries_of(connection: AsyncConnection, row: SqlRow[Any]) -> list[MonitorEntry]:
    """What was logged in the trace of a prediction; of a trace with several predictions, what was logged for this one,
    and what cannot be told apart."""
    if not row.trace_id:
        return []
    query = (
        select(monitor_entries)
        .where(monitor_entries.c.organization == row.organization, monitor_entries.c.trace_id == row.trace_id)
        .where(monitor_entries.c.deployment.in_(["", row.deployment]))
        .order_by(monitor_entries.c.time_ns, monitor_entries.c.sequence)
        .limit(MAX_SPANS_PER_TRACE)
    )
    entries = [
        MonitorEntry(found.organization, found.monitor, found.time_ns, found.trace_id, found.data, found.deployment)
        for found in await connection.execute(query)
    ]
    if entries:
        same = select(predictions.c.prediction).where(
            predictions.c.organization == row.organization,
            predictions.c.trace_id == row.trace_id,
            predictions.c.deployment == row.deployment,
        )
        ids = {id_ for (id_,) in await connection.execute(same)}
        if len(ids) > 1:
            steps = await _requests(connection, row.organization, row.trace_id)
            entries = [entry for entry in entries if asker_of(entry, steps, ids) in ("", row.prediction)]
    return entries[:_MOST_ENTRIES]


async def _requests(connection: AsyncConnection, organization: str, trace_id: str) -> dict[str, tuple[str, str]]:
    """For each span of a trace its parent, and of the gateway's the request id."""
    query = select(spans.c.span_id, spans.c.parent_span_id, spans.c.attributes).where(
        spans.c.organization == organization, spans.c.trace_id == trace_id
    )
    return {
        span_id: (parent, json.loads(attributes).get(_REQUEST, "") if f'"{_REQUEST}"' in attributes else "")
        for span_id, parent, attributes in await connection.execute(query)
    }


async def _next_sequence(connection: AsyncConnection, column: ColumnElement[int], now_us: int) -> int:
    """The first number for a batch. Never below the clock: an emptied log must not give a tail old numbers again."""
    return max((await connection.scalar(select(func.max(column))) or 0) + 1, now_us)


def _row(sequence: int, prediction: Prediction) -> dict[str, Any]:
    request, response = prediction.request, prediction.response
    return {
        "sequence": sequence,
        "organization": prediction.organization,
        "prediction": prediction.id,
        "deployment": prediction.deployment,
        "revision": prediction.revision,
        "target": prediction.target,
        "bento": prediction.bento,
        "models": "\n".join(prediction.models),
        "replica": prediction.replica,
        "api_token": prediction.api_token,
        "start_time_us": prediction.start_time_us,
        "latency_us": prediction.latency_us,
        "method": prediction.method,
        "path": prediction.path,
        "protocol": prediction.protocol,
        "status": prediction.status,
        "response_flags": prediction.response_flags,
        "trace_id": prediction.trace_id,
        "peer": prediction.peer,
        "request_content_type": request.content_type,
        "request_size_bytes": request.body_size_bytes,
        "request_truncated": request.truncated,
        "response_content_type": response.content_type,
        "response_size_bytes": response.body_size_bytes,
        "response_truncated": response.truncated,
        "first_byte_us": prediction.first_byte_us,
    }


def _body_row(sequence: int, prediction: Prediction) -> dict[str, Any]:
    return {
        "sequence": sequence,
        "request_headers": json.dumps(dict(prediction.request.headers), separators=(",", ":")),
        "request_body": prediction.request.body,
        "response_headers": json.dumps(dict(prediction.response.headers), separators=(",", ":")),
        "response_body": prediction.response.body,
    }


def _size(body_row: dict[str, Any]) -> int:
    return sum(len(body_row[key]) for key in ("request_headers", "request_body", "response_headers", "response_body"))


def _prediction(row: SqlRow[Any], entries: Sequence[MonitorEntry] = ()) -> Prediction:
    values = row._mapping
    return Prediction(
        id=row.prediction,
        organization=row.organization,
        deployment=row.deployment,
        start_time_us=row.start_time_us,
        latency_us=row.latency_us,
        first_byte_us=row.first_byte_us,
        status=row.status,
        trace_id=row.trace_id,
        revision=row.revision,
        target=row.target,
        bento=row.bento,
        models=tuple(row.models.split("\n")) if row.models else (),
        replica=row.replica,
        api_token=row.api_token,
        method=row.method,
        path=row.path,
        protocol=row.protocol,
        response_flags=row.response_flags,
        peer=row.peer,
        request=Payload(
            headers=json.loads(values.get("request_headers", "{}")),
            body=bytes(values.get("request_body", b"")),
            body_size_bytes=row.request_size_bytes,
            truncated=row.request_truncated,
            content_type=row.request_content_type,
        ),
        response=Payload(
            headers=json.loads(values.get("response_headers", "{}")),
            body=bytes(values.get("response_body", b"")),
            body_size_bytes=row.response_size_bytes,
            truncated=row.response_truncated,
            content_type=row.response_content_type,
        ),
        monitor_entries=tuple(entries),
    )


def _fingerprint(entry: MonitorEntry, ordinal: int) -> bytes:
    parts = (entry.organization, entry.monitor, str(entry.time_ns), entry.trace_id, entry.deployment, entry.data)
    content = "\0".join((str(ordinal), *parts)).encode()
    return blake2b(content, digest_size=16).digest()


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]
