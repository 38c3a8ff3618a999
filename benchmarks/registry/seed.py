"""Models and versions as a company has them after some years, written in bulk: the same in Ekiben and in MLflow.

A hundred thousand models and a million versions at scale 1. One model has a hundredth of all versions; the others share
the rest. Each version has four labels: `team` (200 values, some much more frequent than others), `stage` (prod on a
twentieth), `region` (three) and `framework` (five); one in a thousand has also `audit`.
"""

import json
import random
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import asyncpg
import sqlalchemy as sa

from services.registry.store.tables import alias_changes, aliases, label_term, labels, repositories, versions

ORGANIZATION = "default"
ALIAS = "production"
HOT = "hot-model"
"""The model that has more versions than any other."""

_FIRST = 1_600_000_000_000_000
_STEP = 60_000_000
_WORDS = [
    "fraud",
    "churn",
    "credit",
    "vision",
    "speech",
    "routing",
    "pricing",
    "demand",
    "search",
    "ranking",
    "basket",
    "claims",
    "triage",
    "quality",
]
_FRAMEWORKS = ("sklearn", "pytorch", "xgboost", "transformers", "onnx")
_term = lru_cache(maxsize=100_000)(label_term)


@dataclass(frozen=True)
class Seed:
    """How much there is."""

    scale: float

    @property
    def models(self) -> int:
        """Model repositories."""
        return max(20, int(100_000 * self.scale))

    @property
    def versions(self) -> int:
        """Versions of all of them."""
        return max(200, int(1_000_000 * self.scale))

    def model(self, number: int) -> str:
        """The name of a model."""
        if number == 0:
            return HOT
        return f"{_WORDS[number % len(_WORDS)]}-{_WORDS[number // 14 % len(_WORDS)]}-{number}"

    def model_of(self, number: int) -> int:
        """Which model a version is of."""
        return 0 if number % 100 == 0 else 1 + (number * 7919) % (self.models - 1)

    def labels_of(self, number: int) -> dict[str, str]:
        """The labels of a version."""
        dice = random.Random(number)
        found = {
            "team": f"team-{min(int(dice.paretovariate(0.5)), 200)}",
            "stage": dice.choices(("prod", "staging", "dev"), (5, 15, 80))[0],
            "region": dice.choice(("eu", "us", "ap")),
            "framework": dice.choice(_FRAMEWORKS),
        }
        if number % 1000 == 7:
            found["audit"] = f"case-{number}"
        return found

    def numbered(self) -> Iterator[tuple[int, int, int]]:
        """Each version: its number, its model's, and which version of that model it is, from 1."""
        counts: dict[int, int] = {}
        for number in range(self.versions):
            model = self.model_of(number)
            counts[model] = counts.get(model, 0) + 1
            yield number, model, counts[model]


def _repositories(seed: Seed) -> Iterator[tuple[Any, ...]]:
    for number in range(seed.models):
        at = _FIRST + number * _STEP
        yield (
            *(number + 1, ORGANIZATION, "model", seed.model(number), str(uuid.UUID(int=number))),
            *(f"What {seed.model(number)} is for" if number % 5 == 0 else "", "{}", f"users/u{number % 500}"),
            *(f"users/u{number % 500}", at, at, 1),
        )


def _versions(seed: Seed) -> Iterator[tuple[Any, ...]]:
    for number, model, version in seed.numbered():
        at = _FIRST + number * _STEP
        state = "FAILED" if number % 100 == 99 else "PENDING" if number % 50 == 48 else "READY"
        creator = f"users/u{number * 31 % 500}"
        module = f"bentoml.{_FRAMEWORKS[number % 5]}"
        yield (
            *(number + 1, model + 1, ORGANIZATION, "model", seed.model(model), f"v{version}"),
            *(str(uuid.UUID(int=number)), f"Trained for quarter {number % 997}" if number % 5 == 0 else ""),
            *(
                json.dumps(seed.labels_of(number)),
                creator,
                creator,
                at,
                at,
                1,
                json.dumps({"module": module}),
                module,
                "",
            ),
            *(False, "[]", at, state, f"sha256:{number:064x}" if state == "READY" else None),
            *(number * 104729 % 10**9, "", None, None),
        )


def _labels(seed: Seed) -> Iterator[tuple[Any, ...]]:
    scope = (ORGANIZATION, "version", "model")
    for number in range(seed.versions):
        for key, value in seed.labels_of(number).items():
            terms = _term(*scope, key), _term(*scope, key, value)
            yield "version", number + 1, key, value, *terms, _FIRST + number * _STEP


def _firsts(seed: Seed) -> Iterator[tuple[int, str]]:
    """The first version of each model that has one: its number, and the model's name."""
    return ((number, seed.model(model)) for number, model, version in seed.numbered() if version == 1)


def _aliases(seed: Seed) -> Iterator[tuple[Any, ...]]:
    for number, model in _firsts(seed):
        yield ORGANIZATION, "model", model, ALIAS, number + 1


def _alias_changes(seed: Seed) -> Iterator[tuple[Any, ...]]:
    for number, model in _firsts(seed):
        at = _FIRST + number * _STEP
        yield ORGANIZATION, "model", model, ALIAS, 1, at, "users/u1", "", "v1", str(uuid.UUID(int=number)), ""


def _rows(seed: Seed) -> dict[sa.Table, Iterator[tuple[Any, ...]]]:
    return {
        repositories: _repositories(seed),
        versions: _versions(seed),
        labels: _labels(seed),
        aliases: _aliases(seed),
        alias_changes: _alias_changes(seed),
    }


_COLUMNS = {
    repositories: "id organization kind repository uid description labels creator updater create_time update_time "
    "revision",
    versions: "id repository_id organization kind repository version uid description labels creator updater "
    "create_time update_time revision manifest module bentoml_version development models build_time state digest "
    "size_bytes failure upload_start_time upload_end_time",
    labels: "owner owner_id key value key_term value_term create_time",
    aliases: "organization kind repository alias version_id",
    alias_changes: "organization kind repository alias number create_time user_name before version version_uid reason",
}


async def seed_postgres(connection: asyncpg.Connection, seed: Seed) -> None:
    """Fill the migrated, empty tables. Their indexes are made anew afterwards, which takes half the time."""
    rows = _rows(seed)
    indexes = await connection.fetch(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = ANY($1) AND schemaname = current_schema() "
        "AND indexname LIKE 'ix\\_%'",
        [table.name for table in rows],
    )
    for index in indexes:
        await connection.execute(f"DROP INDEX {index['indexname']}")
    for table, records in rows.items():
        await connection.copy_records_to_table(table.name, records=records, columns=_COLUMNS[table].split())
    for index in indexes:
        await connection.execute(index["indexdef"])
    for table in (repositories, versions):
        name = f"'{table.name}', 'id'"
        await connection.execute(f"SELECT setval(pg_get_serial_sequence({name}), (SELECT max(id) FROM {table.name}))")
    await connection.execute("VACUUM ANALYZE")


def seed_sqlite(path: str, seed: Seed) -> None:
    """Fill the migrated, empty tables."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("BEGIN")
    for table, records in _rows(seed).items():
        names = _COLUMNS[table].split()
        marks = ", ".join("?" * len(names))
        connection.executemany(f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})", records)
    connection.execute("COMMIT")
    connection.close()


async def seed_mlflow(connection: asyncpg.Connection, seed: Seed) -> None:
    """The same models, versions and labels (its tags) in MLflow's own tables, made by itself before."""

    def versions_of() -> Iterable[tuple[Any, ...]]:
        for number, model, version in seed.numbered():
            at = (_FIRST + number * _STEP) // 1000
            yield (
                *("default", seed.model(model), version, at, at, f"Trained for quarter {number % 997}"),
                *(f"u{number * 31 % 500}", "None", f"s3://models/{number}", "READY", ""),
            )

    def tags() -> Iterable[tuple[Any, ...]]:
        for number, model, version in seed.numbered():
            for key, value in seed.labels_of(number).items():
                yield "default", seed.model(model), version, key, value

    await connection.execute("SET session_replication_role = replica")  # foreign keys are not checked, row by row
    copy = connection.copy_records_to_table
    models = (("default", seed.model(n), _FIRST // 1000 + n, _FIRST // 1000 + n, "") for n in range(seed.models))
    columns = "workspace name creation_time last_updated_time description"
    await copy("registered_models", records=models, columns=columns.split())
    columns = "workspace name version creation_time last_updated_time description user_id current_stage source status"
    await copy("model_versions", records=versions_of(), columns=[*columns.split(), "status_message"])
    await copy("model_version_tags", records=tags(), columns=["workspace", "name", "version", "key", "value"])
    named = (("default", model, ALIAS, 1) for _, model in _firsts(seed))
    await copy("registered_model_aliases", records=named, columns=["workspace", "name", "alias", "version"])
    await connection.execute("VACUUM ANALYZE")
