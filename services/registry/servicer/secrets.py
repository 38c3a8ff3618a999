"""Secrets and the audit log over gRPC."""

from google.protobuf.empty_pb2 import Empty

from ekiben import names
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1 import identity_pb2_grpc
from services.kernel import pages, updates
from services.kernel.clock import Clock
from services.kernel.identity import current_principal
from services.registry import audit as audit_cases
from services.registry import secrets as use_cases
from services.registry.audit import AuditFilter
from services.registry.messages import identities as messages
from services.registry.servicer.context import Context


class Secrets(identity_pb2_grpc.SecretsServicer):
    """Serves ekiben.identity.v1.Secrets."""

    def __init__(self, secrets: use_cases.Secrets) -> None:
        self._secrets = secrets

    async def GetSecret(self, request: pb.GetSecretRequest, context: Context) -> pb.Secret:
        """See the proto."""
        name = names.Secret.parse(request.name)
        return messages.secret(await self._secrets.get(current_principal(), name.secret))

    async def ListSecrets(self, request: pb.ListSecretsRequest, context: Context) -> pb.ListSecretsResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, str) or ("",)
        found, total = await self._secrets.list(current_principal(), request.filter, size + 1, *after)
        return pb.ListSecretsResponse(
            secrets=[messages.secret(secret) for secret in found[:size]],
            next_page_token=pages.encode(request, found[size - 1].secret) if len(found) > size else "",
            total_size=total,
        )

    async def CreateSecret(self, request: pb.CreateSecretRequest, context: Context) -> pb.Secret:
        """See the proto."""
        name = names.Secret.parse(request.secret.name)
        values = messages.secret_values(request.secret)
        return messages.secret(await self._secrets.create(current_principal(), name.secret, values))

    async def UpdateSecret(self, request: pb.UpdateSecretRequest, context: Context) -> pb.Secret:
        """See the proto."""
        sent = request.secret
        name = names.Secret.parse(sent.name)
        fields = updates.paths(sent, request.update_mask, messages.SECRET_WRITABLE)
        values = messages.secret_values(sent, fields)
        return messages.secret(await self._secrets.update(current_principal(), name.secret, values, sent.etag))

    async def DeleteSecret(self, request: pb.DeleteSecretRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.Secret.parse(request.name)
        await self._secrets.delete(current_principal(), name.secret, request.etag)
        return Empty()

    async def RevealSecrets(self, request: pb.RevealSecretsRequest, context: Context) -> pb.RevealSecretsResponse:
        """See the proto."""
        wanted = [names.Secret.parse(name).secret for name in request.names]
        found = await self._secrets.reveal(current_principal(), wanted)
        return pb.RevealSecretsResponse(secrets=[messages.secret(secret) for secret in found])


class Audit(identity_pb2_grpc.AuditServicer):
    """Serves ekiben.identity.v1.Audit."""

    def __init__(self, audit: audit_cases.Audit, clock: Clock) -> None:
        self._audit = audit
        self._clock = clock

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: Context
    ) -> pb.ListAuditEntriesResponse:
        """See the proto."""
        size, before = pages.page_size(request.page_size), pages.decode(request, int) or (None,)
        wanted = AuditFilter(request.user, request.resource, request.refused)
        found = await self._audit.list(current_principal(), wanted, size + 1, *before)
        return pb.ListAuditEntriesResponse(
            audit_entries=[messages.audit_entry(entry) for _, entry in found[:size]],
            next_page_token=pages.encode(request, found[size - 1][0]) if len(found) > size else "",
        )

    async def RecordAuditEntries(self, request: pb.RecordAuditEntriesRequest, context: Context) -> Empty:
        """See the proto."""
        organization, now = current_principal().organization, self._clock.now()
        records = [messages.audit_record(entry, organization, now) for entry in request.audit_entries]
        await self._audit.write_all(records)
        return Empty()
