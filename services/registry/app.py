"""The registry, wired."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta

from ekiben.errors import FailedPrecondition
from ekiben.identity.v1 import identity_pb2_grpc as identity
from ekiben.registry.v1 import (
    aliases_pb2_grpc,
    deletions_pb2_grpc,
    files_pb2_grpc,
    garbage_pb2_grpc,
    lineage_pb2_grpc,
    quotas_pb2_grpc,
)
from ekiben.registry.v1 import registry_pb2_grpc as registry
from services.content import open_blobs
from services.content.sealing import KeyFile, open_key_file
from services.kernel.app import Component, Servicer
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import Database, open_database
from services.registry.accounts import Accounts
from services.registry.aliases import Aliases
from services.registry.audit import Audit
from services.registry.bytes import Bytes, listen
from services.registry.catalog import Catalog
from services.registry.collector import Collector
from services.registry.deletions import Deletions
from services.registry.files import Files
from services.registry.first_start import ensure_admin
from services.registry.lineage import Lineage
from services.registry.lister import Lister
from services.registry.logins import Logins
from services.registry.quotas import Quotas
from services.registry.secrets import Secrets
from services.registry.servicer.accounts import Accounts as AccountsServicer
from services.registry.servicer.accounts import Logins as LoginsServicer
from services.registry.servicer.aliases import Aliases as AliasesServicer
from services.registry.servicer.bentos import Bentos as BentosServicer
from services.registry.servicer.deletions import Deletions as DeletionsServicer
from services.registry.servicer.files import Files as FilesServicer
from services.registry.servicer.garbage import Garbage as GarbageServicer
from services.registry.servicer.lineage import Lineage as LineageServicer
from services.registry.servicer.models import Models as ModelsServicer
from services.registry.servicer.quotas import Quotas as QuotasServicer
from services.registry.servicer.secrets import Audit as AuditServicer
from services.registry.servicer.secrets import Secrets as SecretsServicer
from services.registry.servicer.uploads import Uploads as UploadsServicer
from services.registry.settings import Settings
from services.registry.signing import Signer
from services.registry.store.accounts import any_user
from services.registry.store.secrets import used_keys
from services.registry.uploads import Uploads

MIGRATIONS = "services.registry.migrations"


@asynccontextmanager
async def open_registry(settings: Settings, *, clock: Clock = SYSTEM) -> AsyncIterator[Component]:
    """Everything the registry needs, opened in order and closed in reverse; the bytes endpoint listens by then."""
    async with open_database(settings) as database, open_blobs(settings.blobs_url) as blobs:
        await database.migrate(MIGRATIONS)
        async with database.alone("keys"):  # of two that start first, the second must find that there was a first
            keys = await _open_keys(database, settings)
            await ensure_admin(
                database,
                clock,
                organization=settings.organization,
                admin=settings.admin_user,
                admin_token_file=settings.admin_token_file,
            )
        grace = timedelta(seconds=settings.garbage_grace_s)
        signer = Signer(keys.signing_keys)
        catalog = Catalog(database, clock, delete_grace=timedelta(seconds=settings.delete_grace_s))
        deletions = Deletions(database, clock)
        accounts = Accounts(database, clock)
        audit = Audit(database)
        lister = Lister(database, blobs, clock)
        uploads = Uploads(
            database,
            blobs,
            signer,
            clock,
            expire=timedelta(seconds=settings.upload_expire_s),
            garbage_grace=grace,
            direct=settings.blobs_direct,
            named=lister.wake,
        )
        collector = Collector(
            database,
            blobs,
            uploads,
            deletions,
            clock,
            interval_s=settings.collect_interval_s,
            garbage_grace=grace,
            organization=settings.organization,
        )
        secrets = Secrets(database, keys, clock)
        logins = Logins(database, clock)
        async with aclosing(uploads), listen(Bytes(uploads, blobs, signer, clock).app(), settings.blobs_listen):
            yield Component(
                "registry",
                servicers=(
                    Servicer(
                        "ekiben.registry.v1.Models", registry.add_ModelsServicer_to_server, ModelsServicer(catalog)
                    ),
                    Servicer(
                        "ekiben.registry.v1.Bentos", registry.add_BentosServicer_to_server, BentosServicer(catalog)
                    ),
                    Servicer(
                        "ekiben.registry.v1.Quotas",
                        quotas_pb2_grpc.add_QuotasServicer_to_server,
                        QuotasServicer(Quotas(database, clock)),
                    ),
                    Servicer(
                        "ekiben.registry.v1.Aliases",
                        aliases_pb2_grpc.add_AliasesServicer_to_server,
                        AliasesServicer(Aliases(database, clock)),
                    ),
                    Servicer(
                        "ekiben.registry.v1.Uploads",
                        registry.add_UploadsServicer_to_server,
                        UploadsServicer(uploads, settings.blobs_listen),
                    ),
                    Servicer(
                        "ekiben.registry.v1.Files",
                        files_pb2_grpc.add_FilesServicer_to_server,
                        FilesServicer(Files(database, uploads), settings.blobs_listen),
                    ),
                    Servicer(
                        "ekiben.registry.v1.Deletions",
                        deletions_pb2_grpc.add_DeletionsServicer_to_server,
                        DeletionsServicer(deletions),
                    ),
                    Servicer(
                        "ekiben.registry.v1.Garbage",
                        garbage_pb2_grpc.add_GarbageServicer_to_server,
                        GarbageServicer(collector),
                    ),
                    Servicer(
                        "ekiben.registry.v1.Lineage",
                        lineage_pb2_grpc.add_LineageServicer_to_server,
                        LineageServicer(Lineage(database, clock)),
                    ),
                    Servicer(
                        "ekiben.identity.v1.Accounts",
                        identity.add_AccountsServicer_to_server,
                        AccountsServicer(accounts),
                    ),
                    Servicer(
                        "ekiben.identity.v1.Logins", identity.add_LoginsServicer_to_server, LoginsServicer(logins)
                    ),
                    Servicer(
                        "ekiben.identity.v1.Secrets", identity.add_SecretsServicer_to_server, SecretsServicer(secrets)
                    ),
                    Servicer(
                        "ekiben.identity.v1.Audit", identity.add_AuditServicer_to_server, AuditServicer(audit, clock)
                    ),
                ),
                loops=(collector.run, lister.run, accounts.note_uses),
                ready=database.ping,
                authenticator=accounts,
                auditor=audit,
                drain=accounts.write_uses,
            )


async def _open_keys(database: Database, settings: Settings) -> KeyFile:
    """The keys, of which every registry on a database has the same.

    Raises:
        FailedPrecondition: the file has others, or is missing where it must not be made (SECRETS_KEY_INVALID).
    """
    path = settings.secrets_key_file
    async with database.read() as connection:
        used = await used_keys(connection)
        started_before = await any_user(connection, settings.organization)
    if database.dialect == "postgresql" and started_before and not used and not path.exists():
        # Likely a second machine: a key of its own would refuse the URLs that the first one signs, and its new admin
        # token would end the first one's.
        raise FailedPrecondition(
            f"The key file {str(path)!r} is missing, and this database has a registry with one. Copy it "
            "from there, and the admin token's file too. Where it is lost, no secret is: make a new one with "
            f"printf 'k1:%s\\n' \"$(openssl rand -base64 32)\" > {path}",
            reason="SECRETS_KEY_INVALID",
            path=path,
        )
    keys = await asyncio.to_thread(open_key_file, path, may_make=not used)
    if used and not used & set(keys.keys.ids):
        raise FailedPrecondition(
            f"The key file {str(path)!r} has none of the keys that the secrets here are sealed with: "
            f"{', '.join(sorted(used))}. Copy the file of the registry that runs.",
            reason="SECRETS_KEY_INVALID",
            path=path,
        )
    return keys
