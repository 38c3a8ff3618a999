"""Secrets: values that replicas and builds get, write-only."""

from collections.abc import AsyncIterator, Sequence

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import pages
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1.identity_pb2_grpc import SecretsStub


class Secrets:
    """Secrets. Values go in and never come out."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = SecretsStub(channel)

    async def get(self, name: str) -> pb.Secret:
        """One secret, without its values."""
        return await self._stub.GetSecret(pb.GetSecretRequest(name=name))

    def list(self, *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.Secret]:
        """Secrets by name, without their values."""
        return pages.items(self._stub.ListSecrets, pb.ListSecretsRequest(filter=filter), "secrets", limit=limit)

    async def create(self, secret: pb.Secret) -> pb.Secret:
        """Create a secret."""
        return await self._stub.CreateSecret(pb.CreateSecretRequest(secret=secret))

    async def update(self, secret: pb.Secret, paths: Sequence[str] = ()) -> pb.Secret:
        """Change a secret: the `paths`, or what is populated. `items` is replaced as a whole."""
        mask = FieldMask(paths=paths) if paths else None
        return await self._stub.UpdateSecret(pb.UpdateSecretRequest(secret=secret, update_mask=mask))

    async def delete(self, name: str, *, etag: str = "") -> None:
        """Delete a secret. Replicas that run keep what they were given."""
        await self._stub.DeleteSecret(pb.DeleteSecretRequest(name=name, etag=etag))
