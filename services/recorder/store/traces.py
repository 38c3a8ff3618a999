"""Spans and the summaries of their traces in SQL."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, delete, or_, select, tuple_
from sqlalchemy import Row as SqlRow

from services.kernel.db import AsyncConnection, Database
from services.recorder import domain
from services.recorder.domain import Span, Step, TraceFilter, TraceSummary, root_of
from services.recorder.store.tables import spans, trace_services, traces
from services.recorder.store.writes import TRACES, Writer, add_usage, write_rows

# Pairs of an IN list: two parameters each, of the 32,766 that SQLite takes.
_CHUNK = 500
# Most spans of a trace that are read at once where some of its spans come later than others, as they mostly do.
_SHORT = 64
# A span's columns and the primary key, besides its name and attributes.
_ROW_BYTES = 250

Key = tuple[str, str]  # organization, trace id


class Added(NamedTuple):
    """What became of a batch of spans. Those that were there before are in neither count."""

    recorded: int
    trace_full: int


class TraceStore:
    """Adds spans, keeps each trace's summary true, gives traces, and forgets."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer

    async def add(self, batch: Sequence[Span], now_us: int) -> Added:
        """Add those spans that are not there yet and sum up their traces again, in one transaction.

        A trace takes no more than MAX_SPANS_PER_TRACE.

        Raises:
            ResourceExhausted, Unavailable: no space, or no database; nothing was added (see Writer).
        """
        by_trace: dict[Key, dict[str, Span]] = defaultdict(dict)
        for span in batch:
            by_trace[span.organization, span.trace_id].setdefault(span.span_id, span)
        recorded = full = 0
        if not by_trace:
            return Added(0, 0)
        async with self._writer.transaction(TRACES) as connection:
            before = await _summaries(connection, list(by_trace))
            steps, present = await _known(connection, before, by_trace)
            rows: list[Span] = []
            summaries: list[TraceSummary] = []
            search: list[TraceSummary] = []
            for key, found in by_trace.items():
                there = present[key]
                new = [span for id_, span in found.items() if id_ not in there]
                room = domain.MAX_SPANS_PER_TRACE - (before[key].span_count if key in before else 0)
                full += max(0, len(new) - room)
                new = new[: max(0, room)]
                if new:
                    rows += new
                    summary, root_has_parent = domain.summarize(before.get(key), new, there)
                    if root_has_parent and key in steps:
                        summary, root_has_parent = summary.with_root(root_of([*steps[key], *new])), False
                    (search if root_has_parent else summaries).append(summary)
            if rows:
                await write_rows(connection, spans, [_row(span) for span in rows])
                for summary in search:
                    all_steps = await _steps(connection, [(summary.organization, summary.trace_id)])
                    summaries += [summary.with_root(root_of(found)) for found in all_steps.values()]
                await _save(connection, summaries, now_us)
                await _save_services(connection, before, summaries)
                size = sum(len(span.display_name) + len(str(span.attributes)) + _ROW_BYTES for span in rows)
                await add_usage(connection, TRACES, now_us, size)
            recorded = len(rows)
        return Added(recorded, full)

    async def get(self, organization: str, trace_id: str) -> tuple[TraceSummary, list[Span]] | None:
        """One trace with its spans by start time; None where there is none."""
        async with self._database.read() as connection:
            summary = (await _summaries(connection, [(organization, trace_id)])).get((organization, trace_id))
            if summary is None:
                return None
            return summary, await _spans(connection, organization, trace_id)

    async def page(self, wanted: TraceFilter, *, before: tuple[int, str] | None, limit: int) -> list[TraceSummary]:
        """At most `limit` traces by (start, trace id), newest first, from before the position `before`."""
        query = select(traces)
        order: Any = traces.c
        if wanted.service:
            order = trace_services.c
            same = and_(
                traces.c.organization == trace_services.c.organization, traces.c.trace_id == trace_services.c.trace_id
            )
            query = query.select_from(trace_services.join(traces, same)).where(order.service == wanted.service)
        query = query.where(order.organization == wanted.organization)
        if wanted.errors_only:
            query = query.where(traces.c.failed.is_(True))
        if wanted.start_ns is not None:
            query = query.where(order.start_ns >= wanted.start_ns)
        if before is not None:
            start_ns, trace_id = before
            earlier = or_(order.start_ns < start_ns, order.trace_id < trace_id)
            query = query.where(order.start_ns <= start_ns, earlier)
        query = query.order_by(order.start_ns.desc(), order.trace_id.desc()).limit(limit)
        async with self._database.read() as connection:
            rows = list(await connection.execute(query))
            names = await _services(connection, [(row.organization, row.trace_id) for row in rows])
        return [_summary(row, names[row.organization, row.trace_id]) for row in rows]

    async def forget_before(self, updated_us: int, limit: int) -> int:
        """Forget at most `limit` traces that got no span since `updated_us`; how many went."""
        old = select(traces.c.organization, traces.c.trace_id).where(traces.c.updated_us < updated_us)
        async with self._database.transaction() as connection:
            chosen = [tuple(row) for row in await connection.execute(old.order_by(traces.c.updated_us).limit(limit))]
            for start in range(0, len(chosen), _CHUNK):
                keys = chosen[start : start + _CHUNK]
                for table in (spans, trace_services, traces):
                    await connection.execute(
                        delete(table).where(tuple_(table.c.organization, table.c.trace_id).in_(keys))
                    )
        return len(chosen)


def _of(table: Any, keys: Sequence[Key]) -> Iterator[ColumnElement[bool]]:
    """Conditions that together choose the rows of these traces, each of at most `_CHUNK` traces."""
    by_organization: dict[str, list[str]] = defaultdict(list)
    for organization, trace_id in keys:
        by_organization[organization].append(trace_id)
    for organization, trace_ids in by_organization.items():
        for start in range(0, len(trace_ids), _CHUNK):
            yield and_(table.c.organization == organization, table.c.trace_id.in_(trace_ids[start : start + _CHUNK]))


async def _summaries(connection: AsyncConnection, keys: Sequence[Key]) -> dict[Key, TraceSummary]:
    rows = [row for where in _of(traces, keys) for row in await connection.execute(select(traces).where(where))]
    names = await _services(connection, [(row.organization, row.trace_id) for row in rows])
    return {(row.organization, row.trace_id): _summary(row, names[row.organization, row.trace_id]) for row in rows}


async def _services(connection: AsyncConnection, keys: Sequence[Key]) -> dict[Key, set[str]]:
    names: dict[Key, set[str]] = defaultdict(set)
    columns = select(trace_services.c.organization, trace_services.c.trace_id, trace_services.c.service)
    for where in _of(trace_services, keys):
        for organization, trace_id, service in await connection.execute(columns.where(where)):
            names[organization, trace_id].add(service)
    return names


async def _known(
    connection: AsyncConnection, before: Mapping[Key, TraceSummary], by_trace: Mapping[Key, Mapping[str, Span]]
) -> tuple[dict[Key, list[Step]], dict[Key, set[str]]]:
    """All spans of the short ones among the traces that are there; and, for each, which of the new spans and of their
    parents the store holds."""
    short = [key for key, summary in before.items() if summary.span_count <= _SHORT]
    steps = await _steps(connection, short)
    present: dict[Key, set[str]] = defaultdict(set)
    for key, found in steps.items():
        present[key] = {step.span_id for step in found}
    asked = [
        (*key, id_)
        for key, new in by_trace.items()
        if key in before and key not in steps
        for id_ in {id_ for span in new.values() for id_ in (span.span_id, span.parent_span_id) if id_}
    ]
    columns = (spans.c.organization, spans.c.trace_id, spans.c.span_id)
    for start in range(0, len(asked), _CHUNK):
        query = select(*columns).where(tuple_(*columns).in_(asked[start : start + _CHUNK]))
        for organization, trace_id, span_id in await connection.execute(query):
            present[organization, trace_id].add(span_id)
    return steps, present


async def _steps(connection: AsyncConnection, keys: Sequence[Key]) -> dict[Key, list[Step]]:
    """What the place of each span in its trace depends on, of whole traces."""
    found: dict[Key, list[Step]] = defaultdict(list)
    columns = (spans.c.organization, spans.c.trace_id, spans.c.span_id, spans.c.parent_span_id, spans.c.start_ns)
    for where in _of(spans, keys):
        for organization, trace_id, *step in await connection.execute(
            select(*columns, spans.c.display_name).where(where)
        ):
            found[organization, trace_id].append(Step(*step))
    return found


async def _spans(connection: AsyncConnection, organization: str, trace_id: str) -> list[Span]:
    query = select(spans).where(spans.c.organization == organization, spans.c.trace_id == trace_id)
    return [_span(row) for row in await connection.execute(query.order_by(spans.c.start_ns, spans.c.span_id))]


async def _save(connection: AsyncConnection, summaries: Sequence[TraceSummary], now_us: int) -> None:
    rows = [
        (
            summary.organization,
            summary.trace_id,
            summary.start_ns,
            summary.end_ns,
            summary.span_count,
            summary.error_count,
            summary.error_count > 0,
            summary.root_span_id,
            summary.root_parent_span_id,
            summary.root_start_ns,
            summary.root,
            now_us,
        )
        for summary in summaries
    ]
    await write_rows(connection, traces, rows, merge=True)


async def _save_services(
    connection: AsyncConnection, before: dict[Key, TraceSummary], summaries: Sequence[TraceSummary]
) -> None:
    added: list[tuple[str, str, str, int]] = []
    moved: list[tuple[str, str, str, int]] = []
    for summary in summaries:
        old = before.get((summary.organization, summary.trace_id))
        known = old.services if old else frozenset()
        if old is not None and old.start_ns != summary.start_ns:
            moved += [(summary.organization, summary.trace_id, service, summary.start_ns) for service in known]
        new = summary.services - known
        added += [(summary.organization, summary.trace_id, service, summary.start_ns) for service in new]
    await write_rows(connection, trace_services, moved, merge=True)
    await write_rows(connection, trace_services, added)


def _summary(row: SqlRow[Any], services: set[str]) -> TraceSummary:
    return TraceSummary(
        organization=row.organization,
        trace_id=row.trace_id,
        start_ns=row.start_ns,
        end_ns=row.end_ns,
        span_count=row.span_count,
        error_count=row.error_count,
        root_span_id=row.root_span_id,
        root_parent_span_id=row.root_parent_span_id,
        root_start_ns=row.root_start_ns,
        root=row.root,
        services=frozenset(services),
    )


def _row(span: Span) -> tuple[Any, ...]:
    return (
        span.organization,
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.service,
        span.display_name,
        span.kind,
        span.start_ns,
        span.end_ns,
        span.error,
        span.status_message,
        json.dumps(dict(span.attributes), separators=(",", ":"), ensure_ascii=True),
    )


def _span(row: SqlRow[Any]) -> Span:
    return Span(
        organization=row.organization,
        trace_id=row.trace_id,
        span_id=row.span_id,
        parent_span_id=row.parent_span_id,
        service=row.service,
        display_name=row.display_name,
        kind=row.kind,
        start_ns=row.start_ns,
        end_ns=row.end_ns,
        error=row.error,
        status_message=row.status_message,
        attributes=json.loads(row.attributes),
    )
