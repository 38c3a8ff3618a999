"""Create, update, scale, roll back and follow deployments; their revisions, replicas, logs and events."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import pages, watches
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import events_pb2
from ekiben.deployer.v1.deployer_pb2_grpc import DeploymentsStub
from ekiben.deployer.v1.events_pb2_grpc import EventsStub
from ekiben.errors import NotFound, Unavailable

_LINES_AFTER_BREAK = 1000
"""Lines of each replica that are read again after a broken stream: more than are printed during a restart."""


def settled(deployment: pb.Deployment) -> bool:
    """True once what runs is what is desired, or cannot become so without somebody's help."""
    if deployment.observed_generation < deployment.generation:
        return False
    if deployment.state in (pb.Deployment.FAILED, pb.Deployment.TERMINATED):
        return True
    return not deployment.reconciling and deployment.state in (pb.Deployment.RUNNING, pb.Deployment.SCALED_TO_ZERO)


def serving(deployment: pb.Deployment) -> bool:
    """True where requests are answered by what is desired."""
    return settled(deployment) and deployment.state in (pb.Deployment.RUNNING, pb.Deployment.SCALED_TO_ZERO)


class Deployments:
    """Deployments: bentos that are kept running and reachable."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = DeploymentsStub(channel)
        self._events = EventsStub(channel)

    async def get(self, name: str) -> pb.Deployment:
        """One deployment."""
        return await self._stub.GetDeployment(pb.GetDeploymentRequest(name=name))

    def list(self, *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.Deployment]:
        """Deployments, newest first. `filter`: words, `label:key=value`, `is:dev`."""
        request = pb.ListDeploymentsRequest(filter=filter)
        return pages.items(self._stub.ListDeployments, request, "deployments", limit=limit)

    async def create(self, deployment: pb.Deployment, *, validate_only: bool = False) -> pb.Deployment:
        """Create a deployment and return at once; `follow` tells how it goes."""
        request = pb.CreateDeploymentRequest(deployment=deployment, validate_only=validate_only)
        return await self._stub.CreateDeployment(request)

    async def update(
        self, deployment: pb.Deployment, paths: Sequence[str] = (), *, validate_only: bool = False
    ) -> pb.Deployment:
        """Change a deployment: the `paths`, or what is populated. A changed template makes a new revision."""
        mask = FieldMask(paths=paths) if paths else None
        request = pb.UpdateDeploymentRequest(deployment=deployment, update_mask=mask, validate_only=validate_only)
        return await self._stub.UpdateDeployment(request)

    async def rollback(self, name: str, revision: str = "") -> pb.Deployment:
        """Go back to a revision, or to the one before the latest."""
        return await self._stub.RollbackDeployment(pb.RollbackDeploymentRequest(name=name, revision=revision))

    async def scale(self, name: str, replicas: int, *, service: str = "") -> pb.Deployment:
        """Set how many replicas a service has; the entry service when none is named."""
        request = pb.ScaleDeploymentRequest(name=name, service=service, replicas=replicas)
        return await self._stub.ScaleDeployment(request)

    async def terminate(self, name: str) -> pb.Deployment:
        """Drain and stop every replica; an update starts it again."""
        return await self._stub.TerminateDeployment(pb.TerminateDeploymentRequest(name=name))

    async def delete(self, name: str, *, etag: str = "") -> pb.Deployment:
        """Drain, stop and remove; returns what was deleted."""
        return await self._stub.DeleteDeployment(pb.DeleteDeploymentRequest(name=name, etag=etag))

    def follow(self, name: str, *, timeout_s: float | None = None) -> AsyncIterator[pb.Deployment]:
        """The deployment now and after each change; the last one is `settled`. Survives a server that restarts."""
        request = pb.WatchDeploymentRequest(name=name)
        return watches.follow(lambda: self._stub.WatchDeployment(request), until=settled, timeout_s=timeout_s)

    async def wait_terminated(self, name: str, *, timeout_s: float | None = None) -> None:
        """Return once no replica of it is left."""
        await self._until(name, lambda deployment: deployment.state == pb.Deployment.TERMINATED, timeout_s)

    async def wait_deleted(self, name: str, *, timeout_s: float | None = None) -> None:
        """Return once it is gone."""
        with contextlib.suppress(NotFound):
            await self._until(name, lambda deployment: False, timeout_s)

    async def _until(self, name: str, until: Callable[[pb.Deployment], bool], timeout_s: float | None) -> None:
        request = pb.WatchDeploymentRequest(name=name)
        async for _ in watches.follow(lambda: self._stub.WatchDeployment(request), until=until, timeout_s=timeout_s):
            pass

    async def get_revision(self, name: str) -> pb.Revision:
        """One revision."""
        return await self._stub.GetRevision(pb.GetRevisionRequest(name=name))

    def revisions(self, name: str, *, limit: int = 0) -> AsyncIterator[pb.Revision]:
        """The revisions of a deployment, newest first."""
        request = pb.ListRevisionsRequest(parent=name)
        return pages.items(self._stub.ListRevisions, request, "revisions", limit=limit)

    async def replicas(self, name: str) -> Sequence[pb.Replica]:
        """The replicas that a deployment has now, and its crashed ones."""
        return (await self._stub.ListReplicas(pb.ListReplicasRequest(parent=name))).replicas

    async def logs(
        self,
        name: str,
        *,
        service: str = "",
        replica: str = "",
        follow: bool = False,
        tail_lines: int | None = None,
        since: datetime | None = None,
        previous: bool = False,
    ) -> AsyncIterator[pb.LogLine]:
        """What the replicas printed; with `follow` what comes, over restarts of the server too.

        `previous`: only what they printed before they were started last.

        `tail_lines` bounds each replica's past: 0 is none of it, negative all; left out, 100 lines, or all
        `since` a time. Where a stream breaks, the lines of the time between are asked for again and those seen
        already are dropped.
        """
        last: dict[str, tuple[int, int]] = {}  # the time of the newest line of each replica
        before: dict[str, tuple[int, int]] = {}  # the same, as it was when the stream was opened
        opened: list[datetime] = []
        wanted = pb.ReadLogsRequest(
            name=name, service=service, replica=replica, follow=follow, tail_lines=tail_lines, previous=previous
        )
        if since is not None:
            wanted.since_time.FromDatetime(since.astimezone(UTC))

        def open_stream() -> Any:
            nonlocal before
            before = dict(last)
            if opened:
                wanted.tail_lines = _LINES_AFTER_BREAK if last or tail_lines == 0 else wanted.tail_lines
                if tail_lines == 0 and since is None:  # Of those, too, that have printed nothing until now.
                    wanted.since_time.FromDatetime(opened[0])
            opened.append(datetime.now(UTC))
            return self._stub.ReadLogs(wanted)

        async for line in watches.resume(open_stream, retry=(Unavailable,) if follow else ()):
            time = (line.time.seconds, line.time.nanos)
            if time > before.get(line.replica, (-1, 0)):
                last[line.replica] = time
                yield line

    async def events(self, name: str, *, follow: bool = False) -> AsyncIterator[events_pb2.Event]:
        """What the cluster wrote down of it, oldest first; with `follow` what comes, over restarts of the server too.

        An event that happens again is given again, with its new count.
        """
        seen: dict[str, int] = {}
        request = events_pb2.ReadEventsRequest(name=name, follow=follow)
        async for event in watches.resume(
            lambda: self._events.ReadEvents(request), retry=(Unavailable,) if follow else ()
        ):
            if seen.get(event.uid, 0) < event.count:
                seen[event.uid] = event.count
                yield event
