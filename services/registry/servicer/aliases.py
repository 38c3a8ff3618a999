"""Aliases over gRPC."""

from google.protobuf.empty_pb2 import Empty

from ekiben import names
from ekiben.registry.v1 import aliases_pb2 as pb
from ekiben.registry.v1 import aliases_pb2_grpc
from services.kernel import pages
from services.kernel.identity import current_principal
from services.registry import aliases as use_cases
from services.registry.aliases import parse_alias, parse_repository
from services.registry.messages import aliases as messages
from services.registry.messages.catalog import from_timestamp
from services.registry.servicer.context import Context


class Aliases(aliases_pb2_grpc.AliasesServicer):
    """Serves ekiben.registry.v1.Aliases."""

    def __init__(self, aliases: use_cases.Aliases) -> None:
        self._aliases = aliases

    async def GetAlias(self, request: pb.GetAliasRequest, context: Context) -> pb.Alias:
        """See the proto."""
        at = from_timestamp(request.time, "time") if request.HasField("time") else None
        return messages.alias(await self._aliases.get(current_principal(), *parse_alias(request.name), at))

    async def ListAliases(self, request: pb.ListAliasesRequest, context: Context) -> pb.ListAliasesResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, str, str)
        found = await self._aliases.list(current_principal(), *parse_repository(request.parent), size + 1, after)
        more = len(found) > size
        return pb.ListAliasesResponse(
            aliases=[messages.alias(one) for one in found[:size]],
            next_page_token=pages.encode(request, found[size - 1].repository, found[size - 1].alias) if more else "",
        )

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.Alias:
        """See the proto."""
        kind, repository, alias = parse_alias(request.name)
        version = messages.version_id(request.version, kind, repository, "version")
        expected = None
        if request.HasField("expected_version"):
            sent = request.expected_version
            expected = messages.version_id(sent, kind, repository, "expected_version") if sent else ""
        changed = await self._aliases.set(
            current_principal(), kind, repository, alias, version, expected=expected, reason=request.reason
        )
        return messages.alias(changed)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> Empty:
        """See the proto."""
        kind, repository, alias = parse_alias(request.name)
        sent = request.expected_version
        expected = messages.version_id(sent, kind, repository, "expected_version") if sent else None
        await self._aliases.delete(
            current_principal(), kind, repository, alias, expected=expected, reason=request.reason
        )
        return Empty()

    async def ListAliasChanges(
        self, request: pb.ListAliasChangesRequest, context: Context
    ) -> pb.ListAliasChangesResponse:
        """See the proto."""
        kind, *ids = parse_alias(request.parent, wildcard=True)
        repository, alias = (None if id_ == names.WILDCARD else id_ for id_ in ids)
        size, before = pages.page_size(request.page_size), pages.decode(request, int) or (None,)
        found = await self._aliases.changes(current_principal(), kind, repository, alias, size + 1, *before)
        return pb.ListAliasChangesResponse(
            changes=[messages.change(one) for _, one in found[:size]],
            next_page_token=pages.encode(request, found[size - 1][0]) if len(found) > size else "",
        )
