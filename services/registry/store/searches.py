"""A search as SQL."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from services.registry.domain import ContentState
from services.registry.search import Label, Search
from services.registry.store.tables import labels, repositories, versions

Position = tuple[int, int]
"""Of an item in a list: its value of the sorted field, then its id, which parts equals."""


def conditions(search: Search, owner: str) -> list[sa.ColumnElement[bool]]:
    """What must hold for a row of `repositories` (owner `repository`) or `versions` (owner `version`)."""
    table = repositories if owner == "repository" else versions
    found: list[sa.ColumnElement[bool]] = []
    for word in search.words:
        places: list[sa.ColumnElement[bool]] = []
        if "name" in search.fields:
            places.append(table.c.repository.icontains(word, autoescape=True))
            if owner == "version":
                places.append(table.c.version.icontains(word, autoescape=True))
        if "description" in search.fields:
            places.append(table.c.description.icontains(word, autoescape=True))
        found.append(sa.or_(*places))
    for label in search.labels:
        found.append(_label(label, table, owner))
    for values, column in ((search.creators, table.c.creator), (search.updaters, table.c.updater)):
        if values:
            found.append(column.in_(values))
    if search.modules:
        found.append(versions.c.module.in_(search.modules))
    for flag, wanted in search.flags:
        held = versions.c.development if flag == "dev" else versions.c.state == ContentState[flag.upper()]
        found.append(held if wanted else sa.not_(held))
    return found


def _label(label: Label, table: sa.Table, owner: str) -> sa.ColumnElement[bool]:
    # A subquery that does not look at the row: the database runs it once and keeps what it found.
    any_of = [
        labels.c.key == key if value is None else sa.and_(labels.c.key == key, labels.c.value == value)
        for key, value in label.alternatives
    ]
    having = sa.select(labels.c.owner_id).where(labels.c.owner == owner, sa.or_(*any_of))
    return table.c.id.in_(having) if label.wanted else table.c.id.not_in(having)


def sort_key(search: Search, table: sa.Table) -> sa.ColumnElement[int]:
    """The sorted field as a number that is never NULL."""
    column: dict[str, Any] = {
        "created_at": table.c.create_time,
        "updated_at": table.c.update_time,
        "build_at": table.c.get("build_time"),
        "size": table.c.get("size_bytes"),
    }
    return sa.func.coalesce(sa.type_coerce(column[search.sort], sa.BigInteger), 0)


def order(search: Search, table: sa.Table) -> Sequence[sa.ColumnElement[Any]]:
    """By the sorted field, then by id, so that the order is one and stable."""
    columns = (sort_key(search, table), table.c.id)
    return [column.desc() if search.descending else column.asc() for column in columns]


def beyond(search: Search, table: sa.Table, after: Position) -> sa.ColumnElement[bool]:
    """What comes after a position in that order."""
    key, (value, row_id) = sort_key(search, table), after
    if search.descending:
        return sa.or_(key < value, sa.and_(key == value, table.c.id < row_id))
    return sa.or_(key > value, sa.and_(key == value, table.c.id > row_id))
