"""A place with replicas, as one of several runtimes: in memory, for tests."""

import asyncio
from collections.abc import Collection
from typing import Any

from services.deployer.runtimes import Line, SetSpec, SetStatus


class Place:
    """A runtime that remembers what it was asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sets: dict[str, tuple[SetSpec, int]] = {}
        self.released: list[str] = []
        self.known = True
        self.moved = asyncio.Event()

    async def apply(self, spec: SetSpec, replicas: int) -> None:
        self.sets[spec.key] = spec, replicas

    async def scale(self, key: str, replicas: int) -> None:
        self.sets[key] = self.sets[key][0], replicas

    async def release(self, replicas: Collection[str]) -> None:
        self.released += replicas

    async def observe(self) -> list[SetStatus]:
        return [
            SetStatus(key, spec.deployment, spec.deployment_uid, 1, "main", spec.service, replicas)
            for key, (spec, replicas) in self.sets.items()
        ]

    async def drain(self, grace_s: float) -> None: ...

    async def changed(self) -> None:
        await self.moved.wait()

    async def forget(self, deployment_uid: str) -> None: ...

    async def filled(self) -> None: ...

    def knows(self, place: str) -> bool:
        return self.known

    async def logs(self, deployment_uid: str, **which: Any) -> Any:
        yield Line(self.name, "", None, deployment_uid)  # type: ignore[arg-type]
