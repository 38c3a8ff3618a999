"""An installation for operations: the use cases over its rows and blobs, without servers."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ekiben.api.v1.annotations_pb2 import Role
from services.content import open_blobs
from services.content.blobs import WHOLE, BlobStore
from services.content.blobs.source import Chunks
from services.content.digest import Digest
from services.content.sealing import open_key_file
from services.kernel.clock import ManualClock
from services.kernel.db import Database
from services.kernel.identity import Principal
from services.kernel.postgres import with_schema
from services.kernel.settings import DatabaseSettings
from services.operations import backup
from services.operations.installation import Installation
from services.operations.store.services import package_of
from services.registry.catalog import Catalog
from services.registry.collector import Collector
from services.registry.deletions import Deletions
from services.registry.domain import ContentState, Draft, Kind
from services.registry.secrets import Secrets
from services.registry.signing import Signer
from services.registry.uploads import Uploads
from tests.fixtures_registry import bento_archive, model_archive

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
SERVICES = ("builder", "recorder", "deployer", "registry")


class Crash(BaseException):
    """The process was killed here."""


@dataclass
class Registry:
    """The use cases over one installation's rows and blobs."""

    database: Database
    blobs: BlobStore
    clock: ManualClock
    folder: Path
    catalog: Catalog = field(init=False)
    uploads: Uploads = field(init=False)
    collector: Collector = field(init=False)
    secrets: Secrets = field(init=False)

    def __post_init__(self) -> None:
        grace = timedelta(0)
        self.catalog = Catalog(self.database, self.clock)
        self.uploads = Uploads(
            self.database, self.blobs, Signer(b"k"), self.clock, expire=timedelta(hours=1), garbage_grace=grace
        )
        deletions = Deletions(self.database, self.clock)
        self.collector = Collector(
            self.database, self.blobs, self.uploads, deletions, self.clock, interval_s=1, garbage_grace=grace
        )
        keys = open_key_file(self.folder / "secrets.key", may_make=True)
        self.secrets = Secrets(self.database, keys, self.clock)

    async def push(self, version: str, content: bytes, kind: Kind = Kind.MODEL, **draft: Any) -> str:
        """A version with content; its hex digest."""

        async def chunks() -> AsyncIterator[bytes]:
            yield archive

        archive = model_archive(content) if kind is Kind.MODEL else bento_archive(content)
        await self.catalog.create_version(ME, kind, "m", version, Draft(**draft))
        upload = (await self.uploads.create(ME, kind.version_name("m", version), "", None)).upload
        await self.uploads.receive(upload, WHOLE, Chunks(chunks()), len(archive), None)
        await self.uploads.complete(ME, upload, [])
        return hashlib.sha256(archive).hexdigest()

    async def delete(self, version: str) -> None:
        await self.catalog.delete_version(ME, Kind.MODEL, "m", version, "")

    async def collect(self, later: timedelta = timedelta(minutes=5)) -> None:
        self.clock.jump(later)
        for _ in range(2):
            await self.collector.collect()

    async def check(self) -> dict[str, str]:
        """Every version that is READY can be read and is what its digest says; state by version."""
        found = await self.catalog.list_versions(ME, Kind.MODEL, None, "", 1000, None)
        for version in found.items:
            if version.content.state is ContentState.READY:
                data = b"".join([chunk async for chunk in self.blobs.read(Digest.parse(version.content.digest))])
                assert f"sha256:{hashlib.sha256(data).hexdigest()}" == version.content.digest
        return {version.version: version.content.state.value for version in found.items}


def installation_at(url: str, folder: Path, blobs: str = "") -> Installation:
    """A schema for each service on PostgreSQL, a file for each on SQLite."""
    on_sqlite = url.startswith("sqlite")
    urls = {s: f"sqlite:///{folder}/{s}.db" if on_sqlite else with_schema(url, s) for s in SERVICES}
    databases = {service: DatabaseSettings(database_url=url) for service, url in urls.items()}
    return Installation(databases, blobs or f"file://{folder}/blobs", folder / "secrets.key", None)


@asynccontextmanager
async def opened(installation: Installation, folder: Path, clock: ManualClock) -> AsyncIterator[Registry]:
    folder.mkdir(exist_ok=True)
    async with backup.open_databases(installation) as databases:
        for service, database in databases.items():
            await database.migrate(package_of(service))
        async with open_blobs(installation.blobs) as blobs:
            yield Registry(databases["registry"], blobs, clock, folder)
