"""Start, follow and cancel builds; read their logs."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio

from ekiben import pages, watches
from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1.builder_pb2_grpc import BuildsStub
from ekiben.errors import Unavailable

ENDED = frozenset({pb.Build.SUCCEEDED, pb.Build.FAILED, pb.Build.CANCELLED})
"""States that a build never leaves."""


class Builds:
    """Builds: from a bento to what can run."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = BuildsStub(channel)

    async def get(self, name: str) -> pb.Build:
        """One build."""
        return await self._stub.GetBuild(pb.GetBuildRequest(name=name))

    def list(self, *, bento: str = "", limit: int = 0) -> AsyncIterator[pb.Build]:
        """Builds, newest first; of one bento when it is named."""
        return pages.items(self._stub.ListBuilds, pb.ListBuildsRequest(bento=bento), "builds", limit=limit)

    async def create(
        self,
        bento: str,
        *,
        force: bool = False,
        secrets: Sequence[str] = (),
        image: bool = False,
        models_apart: bool = False,
        platforms: Sequence[str] = (),
        priority: "pb.Build.Priority.ValueType" = pb.Build.NORMAL,
    ) -> pb.Build:
        """Start a build, or get the one that is there already; returns at once.

        With `image` it makes an image too, for `platforms` (`linux/amd64`; none for the builder's own); with
        `models_apart` one whose models are images of their own, for a cluster to mount.
        """
        output = pb.Build.IMAGE if image else pb.Build.ENVIRONMENT
        output = pb.Build.IMAGE_AND_MODELS if models_apart else output
        return await self._stub.CreateBuild(
            pb.CreateBuildRequest(
                bento=bento, force=force, secrets=secrets, output=output, platforms=platforms, priority=priority
            )
        )

    async def retry(self, name: str) -> pb.Build:
        """Start anew what a build that failed or was cancelled should have done; returns at once."""
        return await self._stub.RetryBuild(pb.RetryBuildRequest(name=name))

    async def cancel(self, name: str) -> pb.Build:
        """Stop a build that has not ended."""
        return await self._stub.CancelBuild(pb.CancelBuildRequest(name=name))

    def follow(self, name: str, *, timeout_s: float | None = None) -> AsyncIterator[pb.Build]:
        """The build now and after each change; the last one has ended. Survives a server that restarts."""
        request = pb.WatchBuildRequest(name=name)
        return watches.follow(
            lambda: self._stub.WatchBuild(request), until=lambda build: build.state in ENDED, timeout_s=timeout_s
        )

    async def stats(self) -> pb.CacheStats:
        """How much lies in the builder's folder that builds find again."""
        return await self._stub.GetCacheStats(pb.GetCacheStatsRequest())

    async def prune(self, *, dry_run: bool = False) -> pb.PruneCachesResponse:
        """Take away of that what nobody used for long; with `dry_run` say how much."""
        return await self._stub.PruneCaches(pb.PruneCachesRequest(dry_run=dry_run))

    async def log(self, name: str, *, follow: bool = False, tail_lines: int = 0) -> AsyncIterator[pb.BuildLogLine]:
        """The build's log; with `follow` on to its end, each line once even where the stream breaks."""
        next_index = 0

        def open_stream() -> Any:
            tail = 0 if next_index else tail_lines
            return self._stub.ReadBuildLog(pb.ReadBuildLogRequest(name=name, follow=follow, tail_lines=tail))

        async for line in watches.resume(open_stream, retry=(Unavailable,) if follow else ()):
            if line.index >= next_index:
                next_index = line.index + 1
                yield line
