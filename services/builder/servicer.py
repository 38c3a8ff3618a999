"""The Builds service: parse, call one use case, format."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import grpc

from ekiben import names
from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import builder_pb2_grpc
from ekiben.errors import InvalidArgument
from services.builder import messages
from services.builder.domain import Build
from services.builder.environments import Environments
from services.builder.pruning import Pruning
from services.builder.queue import Queue, Wanted
from services.kernel import pages
from services.kernel.identity import current_principal

Context = grpc.aio.ServicerContext[Any, Any]


class Builds(builder_pb2_grpc.BuildsServicer):
    """ekiben.builder.v1.Builds."""

    def __init__(self, queue: Queue, environments: Environments, pruning: Pruning) -> None:
        self._queue = queue
        self._pruning = pruning
        self._environments = environments

    async def GetBuild(self, request: pb.GetBuildRequest, context: Context) -> pb.Build:
        """See the proto."""
        return self._message(await self._queue.get(current_principal(), names.Build.parse(request.name)))

    async def ListBuilds(self, request: pb.ListBuildsRequest, context: Context) -> pb.ListBuildsResponse:
        """See the proto."""
        size = pages.page_size(request.page_size)
        bento = str(names.Bento.parse(request.bento)) if request.bento else ""
        before = pages.decode(request, datetime, str)
        found = await self._queue.list(current_principal(), bento, before, size + 1)
        response = pb.ListBuildsResponse(builds=map(self._message, found[:size]))
        if len(found) > size:
            last = found[size - 1]
            response.next_page_token = pages.encode(request, last.create_time, last.id)
        return response

    async def CreateBuild(self, request: pb.CreateBuildRequest, context: Context) -> pb.Build:
        """See the proto."""
        bento = names.Bento.parse(request.bento)
        secrets = [str(names.Secret.parse(secret)) for secret in request.secrets]
        output = messages.output_of(request.output)
        if request.platforms and not output.is_image:
            raise InvalidArgument(
                "Only an image is for platforms; ask for output IMAGE.",
                reason="PLATFORMS_WITHOUT_IMAGE",
                violations=[("platforms", "must be empty unless output is IMAGE")],
            )
        wanted = Wanted(
            secrets,
            request.force,
            output,
            request.platforms,
            messages.priority_of(request.priority),
        )
        return self._message(await self._queue.create(current_principal(), bento, wanted))

    async def RetryBuild(self, request: pb.RetryBuildRequest, context: Context) -> pb.Build:
        """See the proto."""
        return self._message(await self._queue.retry(current_principal(), names.Build.parse(request.name)))

    async def CancelBuild(self, request: pb.CancelBuildRequest, context: Context) -> pb.Build:
        """See the proto."""
        return self._message(await self._queue.cancel(current_principal(), names.Build.parse(request.name)))

    async def WatchBuild(self, request: pb.WatchBuildRequest, context: Context) -> AsyncIterator[pb.Build]:
        """See the proto."""
        async for build in self._queue.watch(current_principal(), names.Build.parse(request.name)):
            yield self._message(build)

    async def ReadBuildLog(self, request: pb.ReadBuildLogRequest, context: Context) -> AsyncIterator[pb.BuildLogLine]:
        """See the proto."""
        if request.tail_lines < 0:
            raise InvalidArgument("tail_lines must not be negative.", violations=[("tail_lines", "must be 0 or more")])
        name = names.Build.parse(request.name)
        lines = self._queue.read_log(current_principal(), name, follow=request.follow, tail_lines=request.tail_lines)
        async for line in lines:
            yield messages.line_to_proto(line)

    async def GetCacheStats(self, request: pb.GetCacheStatsRequest, context: Context) -> pb.CacheStats:
        """See the proto."""
        found = await self._pruning.amounts()
        kinds = [
            pb.CacheAmount(kind=str(kind), count=amount.count, size_bytes=amount.size_bytes)
            for kind, amount in found.items()
        ]
        return pb.CacheStats(kinds=kinds, location=str(self._environments.path("").parent))

    async def PruneCaches(self, request: pb.PruneCachesRequest, context: Context) -> pb.PruneCachesResponse:
        """See the proto."""
        found = await self._pruning.prune(dry_run=request.dry_run)
        kinds = [
            pb.CacheAmount(kind=str(kind), count=count, size_bytes=found.size_bytes[kind])
            for kind, count in sorted(found.counts.items())
        ]
        return pb.PruneCachesResponse(kinds=kinds)

    def _message(self, build: Build) -> pb.Build:
        here = self._queue.is_here(build)
        path = self._environments.path(build.environment.digest) if build.environment and here else None
        return messages.build_to_proto(build, path)
