"""The builder's parts, opened in order and closed in reverse.

Several builders may share one database. Those on the same `data_dir` share the work: whoever is free takes a build.
Environments are folders, which replicas run from, so a build for one folder is of no use beside another: each folder
has an id, its *site*, and a builder takes builds of its own site only. It shows those of all.
"""

import asyncio
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from ekiben.builder.v1 import builder_pb2_grpc, images_pb2_grpc
from ekiben.errors import EkibenError, ResourceExhausted
from ekiben.identity.v1 import identity_pb2_grpc
from ekiben.registry.v1 import lineage_pb2_grpc, registry_pb2_grpc
from services.builder.access import Access
from services.builder.attesting import Attestor
from services.builder.buildah import BuildahEngine
from services.builder.caches import Caches
from services.builder.collection import Collection
from services.builder.compression import Rules
from services.builder.distribution import Distribution, listen
from services.builder.environments import Environments
from services.builder.forwarding import open_forwarding
from services.builder.gallery import Gallery
from services.builder.image_builds import Workshop
from services.builder.image_environments import ImageEnvironments
from services.builder.image_work import ImageWork
from services.builder.images_servicer import Images
from services.builder.interpreters import Interpreters
from services.builder.locks import Locks
from services.builder.logs import BuildLogs
from services.builder.places import Place
from services.builder.pruning import Pruning
from services.builder.pull_tokens import PullTokens
from services.builder.pulls import Pulls
from services.builder.queue import Queue
from services.builder.repositories import Repositories
from services.builder.servicer import Builds
from services.builder.settings import Settings
from services.builder.shelves import LayoutShelf, Shelf
from services.builder.store import ImageRows, Store
from services.builder.usage import Usage
from services.builder.uv import Programs
from services.builder.worker import Worker, _pass
from services.content.archives import fetch_content
from services.content.attestations import keys
from services.content.fetching import Incoming, incoming
from services.kernel.app import Component, Servicer
from services.kernel.audit import Writer
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import open_database
from services.kernel.leases import id_kept_in
from services.kernel.news import News
from services.kernel.peers import Peers, RemoteAuditor, RemoteAuthenticator
from services.kernel.settings import SettingsError

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_builder(
    settings: Settings,
    peers: Peers,
    *,
    clock: Clock = SYSTEM,
    failpoint: Callable[[str], Awaitable[None]] = _pass,
) -> AsyncIterator[Component]:
    """Everything the builder needs. `failpoint` is called with the name of each step of a build; tests fail there."""
    data_dir = settings.data_dir.absolute()
    run_dir = (settings.run_dir or data_dir / "run").absolute()
    for directory in (data_dir, run_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with open_database(settings) as database:
        await database.migrate("services.builder.migrations")
        with _owner(data_dir) as (owner, alone):
            store, changes = Store(database, id_kept_in(data_dir / "site")), News(database, clock)
            programs = Programs(data_dir, run_dir)
            engine = BuildahEngine(data_dir / "engine", programs, timeout_s=settings.build_timeout_s)
            if alone:  # nobody else builds in this folder: what is unfinished is ours, and garbage
                await programs.end_strays()
                try:
                    await store.requeue(owner)
                except ResourceExhausted as exc:  # A full disk must not keep all else from starting.
                    log.warning("builds wait until their leases run out", extra={"error": str(exc)})
                await asyncio.to_thread(shutil.rmtree, data_dir / "tmp", ignore_errors=True)
                await engine.sweep()
            locks = Locks(data_dir, programs)
            environments = Environments(data_dir, programs, locks, compile_bytecode=settings.compile_bytecode)
            interpreters = Interpreters(programs, settings, clock)
            logs = BuildLogs(data_dir / "logs", clock)
            bentos = registry_pb2_grpc.BentosStub(peers.registry)
            uploads = registry_pb2_grpc.UploadsStub(peers.registry)
            vault = identity_pb2_grpc.SecretsStub(peers.registry)

            async def fetch(resource: str, into: Path) -> str:
                return str(await fetch_content(uploads, peers.blobs, resource, into))

            def opened(resource: str) -> AbstractAsyncContextManager[Incoming]:
                return incoming(uploads, peers.blobs, resource)

            place = await asyncio.to_thread(_place, settings, store.site)
            rows = ImageRows(database, place.name)
            models = registry_pb2_grpc.ModelsStub(peers.registry)
            workshop = Workshop(
                data_dir, ImageEnvironments(data_dir, programs, locks), interpreters, engine, _attestor(settings)
            )
            compression = Rules.parse(settings.images_compression).of(settings.images_at)
            work = ImageWork(place, rows, workshop, bentos, models, fetch, opened, clock, failpoint, compression)
            usage = Usage(store, lineage_pb2_grpc.LineageStub(peers.registry))
            collection = Collection(place, store, rows, usage, settings, clock)
            pruning = Pruning(Caches(data_dir), store, usage, programs, settings, clock)
            queue = Queue(store, rows, environments, logs, bentos, models, changes, clock, place, settings.bases)
            worker = Worker(
                store,
                locks,
                environments,
                interpreters,
                logs,
                changes,
                fetch,
                work,
                vault,
                settings,
                owner,
                clock,
                failpoint,
            )
            tokens = PullTokens(peers.service_token, clock)
            servicers = [
                Servicer(
                    "ekiben.builder.v1.Builds",
                    builder_pb2_grpc.add_BuildsServicer_to_server,
                    Builds(queue, environments, pruning),
                ),
                Servicer(
                    "ekiben.builder.v1.Images",
                    images_pb2_grpc.add_ImagesServicer_to_server,
                    Images(Gallery(rows, place, usage, collection), collection, tokens),
                ),
            ]
            async with _served_images(settings, peers, rows, tokens, clock) as loops:
                yield Component(
                    "builder",
                    servicers=servicers,
                    loops=[worker.run, changes.run, collection.run, pruning.run, *loops],
                    ready=store.ping,
                )


def _place(settings: Settings, site: str) -> Place:
    try:
        return Place.at(settings.images_at, settings.data_dir, site)
    except OSError as exc:
        raise SettingsError([f"images: no layout can be kept in {settings.images_at}: {exc}"]) from None


def _attestor(settings: Settings) -> Attestor | None:
    """What is said of images, and the key that signs it. Raises SettingsError for a key that cannot be used."""
    if not settings.attestations:
        return None
    key = None
    if settings.signing_key_file is not None:
        try:
            key = keys.load_private(settings.signing_key_file, settings.signing_key_password_file)
        except EkibenError as exc:
            raise SettingsError([f"signing_key_file: {exc.message}"]) from None
        log.info("images are signed", extra={"key": keys.hint_of(key.public_key())})
    return Attestor(settings.data_dir.absolute(), key=key, builder=settings.identity)


@asynccontextmanager
async def _served_images(
    settings: Settings, peers: Peers, rows: ImageRows, tokens: PullTokens, clock: Clock
) -> AsyncIterator[list[Callable[[], Awaitable[None]]]]:
    """Images for container engines, where the settings say; gives the loops that this needs."""
    if not settings.images_listen:
        yield []
        return
    kind, _, place = settings.images_at.partition(":")
    auditor = RemoteAuditor(peers.registry, clock)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(auditor.close)
        writer = Writer(auditor, clock)
        stack.push_async_callback(writer.finish)
        access = Access(RemoteAuthenticator(peers.registry, clock), writer, tokens)
        shelf: Shelf = LayoutShelf(Repositories(Path(place)))
        if kind != "oci":
            shelf = await stack.enter_async_context(open_forwarding(place.removeprefix("//")))
        pulls = Pulls(rows, clock)
        served = Distribution(shelf, access, pulls.note)
        await stack.enter_async_context(listen(served.app(), settings.images_listen))
        yield [auditor.run, pulls.run]


@contextmanager
def _owner(data_dir: Path) -> Iterator[tuple[str, bool]]:
    """Who this builder is in its leases, and whether it is the only one on its folder.

    The only one keeps its name over restarts, so that it knows its former life's leases and need not wait for them.
    """
    handle = os.open(data_dir / "owner", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield uuid.uuid4().hex, False
            return
        name = os.read(handle, 64).decode()
        if not name:
            name = uuid.uuid4().hex
            os.write(handle, name.encode())
        yield name, True
    finally:
        os.close(handle)
