"""Aliases: names such as `production` that mean one version of a repository, and move."""

from collections.abc import AsyncIterator
from datetime import datetime

import grpc.aio

from ekiben import pages
from ekiben.registry.v1 import aliases_pb2 as pb
from ekiben.registry.v1.aliases_pb2_grpc import AliasesStub


class Aliases:
    """Aliases of models and bentos, and the history of each."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = AliasesStub(channel)

    async def get(self, name: str, *, at: datetime | None = None) -> pb.Alias:
        """What an alias names, or named at a time (aware)."""
        request = pb.GetAliasRequest(name=name)
        if at is not None:
            request.time.FromDatetime(at)
        return await self._stub.GetAlias(request)

    def list(self, parent: str = "modelRepositories/-", *, limit: int = 0) -> AsyncIterator[pb.Alias]:
        """Aliases of a repository, or of all of a kind, by repository and alias."""
        return pages.items(self._stub.ListAliases, pb.ListAliasesRequest(parent=parent), "aliases", limit=limit)

    async def set(self, name: str, version: str, *, expected: str | None = None, reason: str = "") -> pb.Alias:
        """Make an alias name a version, which may itself be named by an alias or as `latest`.

        `expected` is the version that it must name now, the empty string for none; None does not ask.

        Raises:
            Aborted: it names another than `expected` (ALIAS_MOVED).
        """
        request = pb.SetAliasRequest(name=name, version=version, expected_version=expected, reason=reason)
        return await self._stub.SetAlias(request)

    async def delete(self, name: str, *, expected: str = "", reason: str = "") -> None:
        """Delete an alias, whatever it names or only if it is `expected`; its history stays."""
        await self._stub.DeleteAlias(pb.DeleteAliasRequest(name=name, expected_version=expected, reason=reason))

    def changes(self, parent: str, *, limit: int = 0) -> AsyncIterator[pb.AliasChange]:
        """Every change of an alias, newest first; `-` in place of its id, or of its repository's, means all."""
        request = pb.ListAliasChangesRequest(parent=parent)
        return pages.items(self._stub.ListAliasChanges, request, "changes", limit=limit)
