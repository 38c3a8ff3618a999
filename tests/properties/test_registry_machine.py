"""The registry against the model of it, on both databases: whatever is done to both in any order, both say the same."""

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import EkibenError
from services.content import open_blobs
from services.content.blobs import BlobStore
from services.content.blobs.source import Chunks
from services.content.digest import Digest
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.identity import Principal
from services.registry.aliases import Aliases
from services.registry.app import MIGRATIONS
from services.registry.catalog import Catalog, etag
from services.registry.collector import Collector
from services.registry.deletions import Deletions
from services.registry.domain import ContentState, Draft, Kind
from services.registry.signing import Signer
from services.registry.store import metadata
from services.registry.uploads import Uploads
from tests.fixtures_registry import bento_archive, model_archive
from tests.registry_model import Model, MUpload, MVersion, Refused, Scope, digest_of, split
from tests.registry_queries import DESCRIPTIONS, LABELS, MANIFESTS, Query, Walk, queries

CALLERS = tuple(
    Principal(f"users/{user}", f"organizations/{organization}", Role.ROLE_ADMIN)
    for user, organization in (("admin", "default"), ("bob", "default"), ("admin", "other"))
)
MODELS, BENTOS = (model_archive(b"one"), model_archive(b"two" * 900)), (bento_archive(b"1"), bento_archive(b"2" * 900))
CONTENTS = (*MODELS, *BENTOS, b"no archive at all")
REPOSITORIES, VERSIONS = ("m", "n-1"), ("v1", "v2", "3")
ALIASES = ("production", "v2", "latest")
EXPIRE, GRACE, DELETE_GRACE = timedelta(hours=1), timedelta(minutes=10), timedelta(minutes=30)

Place = tuple[Principal, Kind, str, str]
"""Of a version that was created once: somebody of its organization, its kind, its repository and its id."""

# Mostly the same few, so that what is done meets what was done before.
caller = st.sampled_from((*CALLERS, CALLERS[0], CALLERS[1]))
kind = st.sampled_from((Kind.MODEL, Kind.MODEL, Kind.BENTO))
repository = st.sampled_from(REPOSITORIES)
another_id = st.none() | st.sampled_from(ALIASES)
"""What a version is called instead of by its own id."""


class Environment:
    """A database, and the loop that everything on it runs in; emptied for each run of the machine."""

    def __init__(self, url: str, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.folder = folder
        self.runs = 0
        self.database: Database = self.run(self.stack.enter_async_context(open_database(url)))
        self.run(self.database.migrate(MIGRATIONS))

    def run(self, work: Any) -> Any:
        """Wait for it."""

        async def waited() -> Any:
            return await work

        return self.runner.run(waited())

    async def empty(self) -> None:
        """Delete every row."""
        async with self.database.transaction() as connection:
            for table in reversed(metadata.sorted_tables):
                await connection.execute(table.delete())

    def close(self) -> None:
        """Close everything."""
        self.run(self.stack.aclose())
        self.runner.close()


@pytest.fixture
def environment(database_url: str, _fast_folder: Path) -> Iterator[Environment]:
    """One for the whole test."""
    made = Environment(database_url, _fast_folder)
    yield made
    made.close()


def scope_of(who: Principal, of: Kind) -> Scope:
    """Where a caller's things are."""
    return who.organization.removeprefix("organizations/"), of


class RegistryMachine(RuleBasedStateMachine):
    """Does everything twice, and compares."""

    places: Bundle[Place] = Bundle("places")
    uploads: Bundle[str] = Bundle("uploads")
    walks: Bundle[Walk] = Bundle("walks")

    def __init__(self, environment: Environment) -> None:
        super().__init__()
        self.environment = environment
        self.run = environment.run
        self.database = environment.database
        self.clock = ManualClock()
        self.model = Model(self.clock.now(), EXPIRE, GRACE, DELETE_GRACE)
        self.stack = AsyncExitStack()
        self.uids: dict[str, Any] = {}

    @initialize(target=places)
    def start(self) -> Any:
        """Open it on an empty database, and create three versions."""
        self.environment.runs += 1
        self.run(self.environment.empty())
        url = f"file://{self.environment.folder}/blobs-{self.environment.runs}"
        self.blobs: BlobStore = self.run(self.stack.enter_async_context(open_blobs(url)))
        self.catalog = Catalog(self.database, self.clock, delete_grace=DELETE_GRACE)
        self.deletions = Deletions(self.database, self.clock)
        self.aliases = Aliases(self.database, self.clock)
        self.moves = Uploads(self.database, self.blobs, Signer(b"k"), self.clock, expire=EXPIRE, garbage_grace=GRACE)
        self.collector = Collector(
            *(self.database, self.blobs, self.moves, self.deletions, self.clock), interval_s=1, garbage_grace=GRACE
        )
        first = ((Kind.MODEL, "v1"), (Kind.MODEL, "v2"), (Kind.BENTO, "v1"))
        return multiple(
            *(self.create_version(CALLERS[0], of, "m", id_, "", {"team": "a"}, MANIFESTS[1]) for of, id_ in first)
        )

    def teardown(self) -> None:
        """Close the blobs."""
        self.run(self.stack.aclose())

    def both(self, real: Awaitable[Any], expected: Callable[[], Any]) -> tuple[Any, Any] | None:
        """What each gives; None when both refuse, for the same reason."""
        self.model.now = self.clock.now()
        try:
            wanted, refused = expected(), ""
        except Refused as exc:
            wanted, refused = None, str(exc)
        try:
            got = self.run(real)
        except EkibenError as exc:
            assert refused == exc.reason, f"refused as {exc.reason}, where the model has {refused or 'an answer'}"
            return None
        assert not refused, f"done, where the model refuses with {refused}"
        return got, wanted

    # Repositories

    @rule(who=caller, of=kind, name=repository, description=st.sampled_from(DESCRIPTIONS), labels=LABELS)
    def create_repository(self, who: Principal, of: Kind, name: str, description: str, labels: dict[str, str]) -> None:
        """A new repository."""
        self.both(
            self.catalog.create_repository(who, of, name, Draft(description, labels)),
            lambda: self.model.create_repository(scope_of(who, of), name, who.user, description, labels),
        )

    @rule(who=caller, of=kind, name=repository, labels=LABELS)
    def update_repository(self, who: Principal, of: Kind, name: str, labels: dict[str, str]) -> None:
        """New labels."""

        def update() -> None:
            found = self.model.repository(scope_of(who, of), name)
            found.labels, found.updater, found.update_time = labels, who.user, self.model.now
            found.revision += 1

        self.both(self.catalog.update_repository(who, of, name, Draft(labels=labels), ""), update)

    @rule(who=caller, of=kind, name=repository, force=st.sampled_from((False, False, True)))
    def delete_repository(self, who: Principal, of: Kind, name: str, force: bool) -> None:
        """Delete it, with all in it or only when empty."""
        self.both(
            self.catalog.delete_repository(who, of, name, "", force=force),
            lambda: self.model.delete_repository(scope_of(who, of), name, force=force),
        )

    # Versions

    @rule(
        target=places,
        who=caller,
        of=kind,
        name=repository,
        id_=st.sampled_from((*VERSIONS, *VERSIONS, *ALIASES)),
        description=st.sampled_from(DESCRIPTIONS),
        labels=LABELS,
        manifest=st.sampled_from(MANIFESTS),
    )
    def create_version(
        self,
        who: Principal,
        of: Kind,
        name: str,
        id_: str,
        description: str,
        labels: dict[str, str],
        manifest: tuple[str, dict[str, object]],
    ) -> Any:
        """A new version."""
        draft = Draft(description, labels, manifest=manifest[0])
        made = self.both(
            self.catalog.create_version(who, of, name, id_, draft),
            lambda: self.model.create_version(scope_of(who, of), name, id_, who.user, description, labels, *manifest),
        )
        if made is None:
            return multiple()
        self.uids[made[0].uid] = made[1]
        return who, of, name, id_

    @rule(place=places, id_=another_id, labels=LABELS, stale=st.sampled_from((False, False, True)))
    def update_version(self, place: Place, id_: str | None, labels: dict[str, str], stale: bool) -> None:
        """New labels and description, by somebody whose copy is fresh or stale."""
        who, of, name, own_id = place
        id_ = id_ or own_id

        async def update() -> None:
            current = await self.catalog.get_version(who, of, name, id_)
            await self.catalog.update_version(
                who, of, name, id_, Draft("ÄRGER", labels), '"stale"' if stale else etag(current)
            )

        def expected() -> None:
            found = self.model.itself(scope_of(who, of), name, id_)
            if stale:
                raise Refused("ETAG_MISMATCH")
            found.description, found.labels, found.updater = "ÄRGER", labels, who.user
            found.update_time = self.model.now
            found.revision += 1
            found.touched += 1

        self.both(update(), expected)

    @rule(place=places, id_=another_id)
    def delete_version(self, place: Place, id_: str | None) -> None:
        """Delete it."""
        who, of, name, own_id = place
        id_ = id_ or own_id
        self.both(
            self.catalog.delete_version(who, of, name, id_, ""),
            lambda: self.model.delete_version(scope_of(who, of), name, id_),
        )

    @rule(data=st.data(), who=caller)
    def undelete_version(self, data: st.DataObject, who: Principal) -> None:
        """Restore one that was deleted, or never."""
        uid = data.draw(st.sampled_from(sorted(self.uids, key=lambda uid: self.uids[uid].serial)))
        organization = scope_of(who, Kind.MODEL)[0]
        self.both(self.deletions.undelete(who, uid), lambda: self.model.undelete(organization, self.uids[uid]))

    @rule(place=places, id_=another_id)
    def get_version(self, place: Place, id_: str | None) -> None:
        """By its id, an alias or `latest`."""
        who, of, name, own_id = place
        id_ = id_ or own_id
        found = self.both(
            self.catalog.get_version(who, of, name, id_), lambda: self.model.meant(scope_of(who, of), name, id_)
        )
        if found is not None:
            self.same(*found)

    # Aliases

    @rule(
        place=places,
        alias=st.sampled_from(ALIASES),
        id_=another_id,
        expected=st.sampled_from((None, None, "", "v1")),
    )
    def set_alias(self, place: Place, alias: str, id_: str | None, expected: str | None) -> None:
        """Make it name a version."""
        who, of, name, own_id = place
        id_ = id_ or own_id
        self.both(
            self.aliases.set(who, of, name, alias, id_, expected=expected),
            lambda: self.model.set_alias(scope_of(who, of), name, alias, id_, expected),
        )

    @rule(place=places, alias=st.sampled_from(ALIASES))
    def delete_alias(self, place: Place, alias: str) -> None:
        """Make it name nothing."""
        who, of, name, _ = place
        self.both(
            self.aliases.delete(who, of, name, alias, expected=None, reason=""),
            lambda: self.model.delete_alias(scope_of(who, of), name, alias),
        )

    # Uploads

    @rule(
        target=uploads,
        place=places,
        announced=st.none() | st.sampled_from(CONTENTS),
        size=st.sampled_from(("", "right", "wrong")),
    )
    def open_upload(self, place: Place, announced: bytes | None, size: str) -> Any:
        """Begin an upload, which may announce what will come."""
        who, of, name, id_ = place
        digest = digest_of(announced) if announced is not None else ""
        size_bytes = len(announced) + (size == "wrong") if announced is not None and size else None
        made = self.both(
            self.moves.create(who, of.version_name(name, id_), digest, size_bytes),
            lambda: self.model.open_upload(scope_of(who, of), name, id_, digest, size_bytes),
        )
        if made is None:
            return multiple()
        self.model.uploads[made[0].upload] = made[1]
        return made[0].upload

    @rule(target=uploads, place=places, which=st.booleans(), parts=st.sampled_from((0, 2)))
    def push(self, place: Place, which: bool, parts: int) -> Any:
        """All of an upload, as clients do it."""
        id_ = self.open_upload(place, None, "")
        if not isinstance(id_, str):
            return id_
        self.send(id_, (MODELS if place[1] is Kind.MODEL else BENTOS)[which], parts, False)
        self.complete(id_)
        return id_

    def upload(self, id_: str) -> tuple[Principal, MUpload]:
        """The model's of this id, and somebody who may go on with it."""
        if id_ not in self.model.uploads:
            raise Refused("UPLOAD_NOT_FOUND")
        found = self.model.uploads[id_]
        held = [scope for scope in self.model.repositories if found.version in self.model.all_versions(scope)]
        return next(who for who in CALLERS if scope_of(who, found.kind) == held[0]), found

    def owner(self, id_: str) -> Principal:
        """Whoever may go on with an upload; anybody when it is gone."""
        return self.upload(id_)[0] if id_ in self.model.uploads else CALLERS[0]

    @rule(id_=uploads, data=st.sampled_from(CONTENTS), pieces=st.sampled_from((0, 0, 2)), skip=st.booleans())
    def send(self, id_: str, data: bytes, pieces: int, skip: bool) -> None:
        """Send content whole, or in two pieces of which the first may be lost."""

        async def chunks(piece: bytes) -> AsyncIterator[bytes]:
            yield piece

        parts = [(0, data)] if not pieces else list(enumerate(split(data, pieces), start=1))[skip:]
        for number, piece in parts:
            self.both(
                self.moves.receive(id_, number, Chunks(chunks(piece)), len(piece), None),
                functools.partial(
                    lambda number, piece: self.model.put(self.upload(id_)[1], number, piece), number, piece
                ),
            )

    @rule(id_=uploads)
    def complete(self, id_: str) -> None:
        """Make it visible."""
        who = self.owner(id_)

        async def complete() -> None:
            _, parts = await self.moves.get(who, id_)
            await self.moves.complete(who, id_, [(part.number, part.etag) for part in parts if part.number])

        self.both(complete(), lambda: self.model.complete(self.upload(id_)[1]))

    @rule(id_=uploads)
    def abort(self, id_: str) -> None:
        """Give it up."""
        self.both(self.moves.abort(self.owner(id_), id_, "x"), lambda: self.model.abort(self.upload(id_)[1]))

    # Time

    @rule(seconds=st.sampled_from((1, 60, 3000, 86_400 * 8)))
    def wait(self, seconds: float) -> None:
        """Let time go by."""
        self.run(self.clock.advance(seconds))

    @rule(hours=st.sampled_from((-1, 1)))
    def jump(self, hours: int) -> None:
        """Somebody sets the clock."""
        self.clock.jump(timedelta(hours=hours))

    @rule()
    def collect(self) -> None:
        """A round of the collector, after which there is nothing but what is named or was claimed of late."""
        self.both(self.collector.collect(), self.model.collect)
        assert self.digests() == set(self.model.stored)
        left = {id_ for id_, upload in self.model.uploads.items() if upload.state == "OPEN"}
        assert set(self.run(self.blobs.uploads())) <= left

    # Searches

    def digests(self) -> set[str]:
        """Of the blobs that are there."""

        async def found() -> set[str]:
            return {str(blob.digest) async for blob in self.blobs.blobs()}

        return set(self.run(found()))

    @rule(who=caller, of=kind, name=st.none() | repository, data=st.data(), size=st.sampled_from((1, 2, 50)))
    def search(self, who: Principal, of: Kind, name: str | None, data: st.DataObject, size: int) -> None:
        """All pages of a search, with nobody writing."""
        query = data.draw(queries(of))
        scope = scope_of(who, of)

        async def all_pages() -> list[Any]:
            items, after = [], None
            while True:
                page = await self.catalog.list_versions(who, of, name, query.text(), size, after)
                items += page.items
                after = page.next
                assert page.counted or page.total > 50
                if after is None:
                    assert page.total == len(items)
                    return items

        def expected() -> list[MVersion]:
            if name is not None:
                self.model.repository(scope, name)
            return query.versions(self.model, scope, name)

        found = self.both(all_pages(), expected)
        if found is not None:
            assert [(v.repository, v.version) for v in found[0]] == [(v.repository, v.name) for v in found[1]], query
            for real, wanted in zip(*found, strict=True):
                self.same(real, wanted)

    @rule(who=caller, of=kind, query=queries(None), size=st.sampled_from((1, 50)))
    def search_repositories(self, who: Principal, of: Kind, query: Query, size: int) -> None:
        """The first page of a search of repositories."""
        found = self.both(
            self.catalog.list_repositories(who, of, query.text(), size, None),
            lambda: query.repositories(self.model, scope_of(who, of)),
        )
        assert found is not None
        page, wanted = found
        assert [item.repository for item in page.items] == [item.name for item in wanted[:size]], query
        assert (page.total, page.next is None) == (len(wanted), len(wanted) <= size)
        for real, expected in zip(page.items, wanted, strict=False):
            latest = expected.latest()
            assert (real.labels, real.revision, real.version_count, real.latest) == (
                expected.labels,
                expected.revision,
                len(expected.versions),
                latest.name if latest else "",
            )

    @rule(target=walks, who=st.sampled_from(CALLERS[:2]), of=kind, data=st.data())
    def begin_walk(self, who: Principal, of: Kind, data: st.DataObject) -> Walk:
        """Begin to read a list page by page, in an order in which nothing moves."""
        query = data.draw(queries(of).filter(lambda query: query.sort != "size"))
        matching = {id(version): version.touched for version in query.versions(self.model, scope_of(who, of), None)}
        expected = {uid: matching[id(v)] for uid, v in self.uids.items() if id(v) in matching}
        return Walk(scope_of(who, of), query, expected)

    @rule(target=walks, walk=consumes(walks), size=st.sampled_from((1, 2)))
    def go_on(self, walk: Walk, size: int) -> Any:
        """Read one more page; at the end, all that was there throughout and was not touched must have come, once."""
        who = CALLERS[0]
        page = self.run(self.catalog.list_versions(who, walk.scope[1], None, walk.query.text(), size, walk.after))
        walk.seen += [item.uid for item in page.items]
        assert len(set(walk.seen)) == len(walk.seen)
        if page.next is not None:
            walk.after = page.next
            return walk
        there = {id(version) for version in self.model.all_versions(walk.scope)}
        for uid, touched in walk.expected.items():
            version = self.uids[uid]
            if id(version) in there and version.touched == touched:
                assert uid in walk.seen, walk.query
        return multiple()

    # What always holds

    def same(self, real: Any, wanted: MVersion) -> None:
        """A version says what the model has."""
        content = real.content
        assert (real.repository, real.version, real.labels, real.description, real.manifest, real.revision) == (
            *(wanted.repository, wanted.name, wanted.labels, wanted.description, wanted.manifest, wanted.revision),
        )
        assert (content.state, content.digest, content.size_bytes, bool(content.failure)) == (
            *(ContentState(wanted.state), wanted.digest, wanted.size_bytes, wanted.failed),
        )
        assert (real.creator, real.create_time, real.update_time) == (
            *(wanted.creator, wanted.create_time, wanted.update_time),
        )

    @invariant()
    def every_version_is_the_same(self) -> None:
        """And there is no other."""
        for who, of in ((CALLERS[0], Kind.MODEL), (CALLERS[0], Kind.BENTO), (CALLERS[2], Kind.MODEL)):
            wanted = {(v.repository, v.name): v for v in self.model.all_versions(scope_of(who, of))}
            page = self.run(self.catalog.list_versions(who, of, None, "", 50, None))
            assert {(real.repository, real.version) for real in page.items} == wanted.keys()
            for real in page.items:
                self.same(real, wanted[real.repository, real.version])

    @invariant()
    def what_is_named_is_there(self) -> None:
        """No version names bytes that are missing or damaged."""
        for digest in self.model.named():

            async def read(digest: str = digest) -> bytes:
                return b"".join([chunk async for chunk in self.blobs.read(Digest.parse(digest))])

            assert f"sha256:{hashlib.sha256(self.run(read())).hexdigest()}" == digest


def test_the_registry_does_what_its_model_does(environment: Environment) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: RegistryMachine(environment),
        settings=settings(
            max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
