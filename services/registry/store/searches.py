"""A search as SQL: which rows it looks at, in which order, and from where on.

What makes it fast at a million versions:

- Each order has an index of the organization's rows of a kind in just that order, and a page begins where the one
  before ended, by comparing rows of values: the database walks the index and stops when the page is full.
- Labels that must be there, and an order by time of creation: the walk is over `labels` instead, whose index holds the
  versions of one label in that order. Several labels are several such walks side by side. So the rows looked at are
  never more than those of the rarest label, however many versions there are.
- Words have an index of trigrams on PostgreSQL (revision 0003); SQLite reads names and descriptions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import InternalTraversal

from services.registry.domain import ContentState, Kind
from services.registry.search import Label, Search
from services.registry.store.tables import label_term, labels, repositories, versions

Position = tuple[int, int]
"""Of an item in a list: its value of the sorted field, then its id, which parts equals."""


@dataclass(frozen=True)
class Matches:
    """What a search finds: `tables` joined, `where` of them, ordered by `key` and `row_id`, which part equals."""

    tables: sa.FromClause
    where: Sequence[sa.ColumnElement[bool]]
    key: sa.ColumnElement[int]
    row_id: sa.ColumnElement[int]
    descending: bool
    all: sa.Select[int]
    """Row ids, in no order; without the joins, whose number of rows PostgreSQL estimates worse."""

    def count(self, limit: int | None) -> sa.Select[int]:
        """How many there are, or `limit` when there are more."""
        found = sa.select(self.row_id).select_from(self.tables).where(*self.where).limit(limit)
        return sa.select(sa.func.count()).select_from(found.subquery())

    def page(self, size: int, after: Position | None) -> sa.Select[int, int]:
        """Row ids and keys of at most `size` rows after a position."""
        found = sa.select(self.row_id.label("id"), self.key.label("key")).select_from(self.tables).where(*self.where)
        columns = (self.key, self.row_id)
        if after is not None:
            here, there = sa.tuple_(*columns), sa.tuple_(*(sa.literal(value, sa.BigInteger) for value in after))
            found = found.where(here < there if self.descending else here > there)
        return found.order_by(*(c.desc() if self.descending else c.asc() for c in columns)).limit(size)


def matches(search: Search, organization: str, kind: Kind, owner: str, repository_id: int | None = None) -> Matches:
    """What a search finds among the repositories (owner `repository`) or versions (`version`), of one repository."""
    table = repositories if owner == "repository" else versions
    scope = (organization, owner, kind)
    where = [table.c.organization == organization, table.c.kind == kind]
    if repository_id is not None:
        where = [versions.c.repository_id == repository_id]
    where += _words(search, table, owner)
    for values, column in ((search.creators, table.c.creator), (search.updaters, table.c.updater)):
        if values:
            where.append(_one_of(column, values))
    if search.modules:
        where.append(_one_of(versions.c.module, search.modules))
    for flag, wanted in search.flags:
        where += _flag(flag, wanted=wanted)
    tables: sa.FromClause = table
    row_id: sa.ColumnElement[int] = table.c.id
    key = sort_key(search, table)
    plain = list(where)
    for label in search.labels:
        if label.wanted and len(label.alternatives) == 1 and search.sort == "created_at":
            plain.append(table.c.id.in_(_holders(label, scope, by_owner=False)))
            held = labels.alias()
            same = [held.c.owner_id == row_id]
            if tables is not table:
                same.append(held.c.create_time == key)
            tables = tables.join(held, sa.and_(*same, _has(held, label, scope)))
            if row_id is table.c.id:
                key, row_id = sa.type_coerce(held.c.create_time, sa.BigInteger), held.c.owner_id
            continue
        for conditions, by_owner in ((where, True), (plain, False)):
            holders = _holders(label, scope, by_owner=by_owner)
            if label.wanted:
                conditions.append(table.c.id.in_(holders))
            else:
                held_by = holders.subquery()
                conditions.append(~sa.exists().where(held_by.c.owner_id == table.c.id))
    return Matches(tables, where, key, row_id, search.descending, sa.select(table.c.id).where(*plain))


class Explained(sa.Executable, sa.ClauseElement):
    """The plan that PostgreSQL has for a statement, as its JSON."""

    # As SQLAlchemy's own statements say it: kept once compiled. A sixth of a search went into compiling this one.
    inherit_cache = True
    _traverse_internals = [("statement", InternalTraversal.dp_clauseelement)]  # noqa: RUF012
    _all_selected_columns: Sequence[Any] = ()

    def __init__(self, statement: sa.Select[Any]) -> None:
        self.statement = statement


@compiles(Explained, "postgresql")
def _explained(element: Explained, compiler: Any, **options: Any) -> str:
    return "EXPLAIN (FORMAT JSON) " + str(compiler.process(element.statement, **options))


class _Folded(FunctionElement[str]):
    """Text with A to Z small, the same whatever the database's locale is."""

    type = sa.Text()
    inherit_cache = True
    name = "folded"


@compiles(_Folded)
def _folded(element: _Folded, compiler: Any, **options: Any) -> str:
    return f"lower({compiler.process(element.clauses, **options)})"


@compiles(_Folded, "postgresql")
def _folded_by_bytes(element: _Folded, compiler: Any, **options: Any) -> str:
    return f'lower({compiler.process(element.clauses, **options)} COLLATE "C")'  # as the index of revision 0003 has it


_SMALL = str.maketrans({chr(code): chr(code + 32) for code in range(ord("A"), ord("Z") + 1)})


def _words(search: Search, table: sa.Table, owner: str) -> list[sa.ColumnElement[bool]]:
    name = table.c.repository
    tag = name if owner == "repository" else name.concat(sa.literal_column("':'")).concat(versions.c.version)
    found: list[sa.ColumnElement[bool]] = []
    for word in search.words:
        small = word.translate(_SMALL)
        places: list[sa.ColumnElement[bool]] = []
        if "name" in search.fields:
            places.append(tag.contains(small, autoescape=True))
        if "description" in search.fields:
            places.append(_Folded(table.c.description).contains(small, autoescape=True))
        found.append(sa.or_(*places))
    return found


def _one_of(column: sa.ColumnElement[str], values: Sequence[str]) -> sa.ColumnElement[bool]:
    return column == values[0] if len(values) == 1 else column.in_(values)  # one keeps the order of an index


def _flag(flag: str, *, wanted: bool) -> list[sa.ColumnElement[bool]]:
    if flag == "dev":
        return [versions.c.development if wanted else ~versions.c.development]
    state = ContentState[flag.upper()]
    found: list[sa.ColumnElement[bool]] = [versions.c.state == state if wanted else versions.c.state != state]
    if (state is not ContentState.READY) is wanted:
        found.append(NOT_READY)  # what the partial index asks for, to the letter
    return found


NOT_READY = versions.c.state != sa.literal_column("'READY'")


def _holders(label: Label, scope: tuple[str, str, str], *, by_owner: bool) -> sa.Select[int]:
    """Ids of those that have a label.

    `by_owner` says its key too, which the term implies: then the database may also look at the labels of one owner, but
    it expects fewer.
    """
    held = labels.alias()
    where = [_has(held, label, scope)]
    if by_owner:
        where += [held.c.owner == scope[1], _one_of(held.c.key, sorted({key for key, _ in label.alternatives}))]
    return sa.select(held.c.owner_id).where(*where)


def _has(held: sa.FromClause, label: Label, scope: tuple[str, str, str]) -> sa.ColumnElement[bool]:
    by_value = [label_term(*scope, key, value) for key, value in label.alternatives if value is not None]
    by_key = [label_term(*scope, key) for key, value in label.alternatives if value is None]
    found = []
    for column, terms in ((held.c.value_term, by_value), (held.c.key_term, by_key)):
        if terms:
            found.append(column == terms[0] if len(terms) == 1 else column.in_(terms))
    return sa.or_(*found)


def sort_key(search: Search, table: sa.Table) -> sa.ColumnElement[int]:
    """The sorted field as a number that is never NULL."""
    if search.sort == "build_at":
        return BUILD_KEY
    names: Mapping[str, str] = {"created_at": "create_time", "updated_at": "update_time", "size": "size_bytes"}
    return sa.type_coerce(table.c[names[search.sort]], sa.BigInteger)


BUILD_KEY: sa.ColumnElement[int] = sa.func.coalesce(
    sa.type_coerce(versions.c.build_time, sa.BigInteger), sa.literal_column("0")
)
"""As its index has it, to the letter."""
