"""Which terminals are refused before anybody is asked for anything."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition
from services.deployer.domain import Terminal
from services.deployer.settings import Settings
from services.deployer.terminals import Input, Terminals
from services.kernel.clock import ManualClock
from services.kernel.identity import Principal

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALLER = Principal("u", "default", Role.ROLE_DEVELOPER)


class Reached(Exception):
    """What is behind the checks was asked."""


class Rows:
    """One terminal that was asked for before the deployer started anew, with another policy."""

    async def get(self, organization: str, deployment: str, terminal: str) -> Terminal:
        return Terminal(terminal, organization, deployment, "uid", "r", "S", (), False, "tools:1", "u", "PENDING", NOW)

    async def open(self, terminal: str, owner: str) -> bool:
        raise Reached


class Deployments:
    """Of which none is there."""

    async def get(self, organization: str, name: str) -> Any:
        raise Reached


class Reconciler:
    """That owns the cluster."""

    @property
    def ownership(self) -> Any:
        return self

    def check(self) -> None:
        pass


def terminals(policy: str) -> Terminals:
    where: Any = {"database_url": "sqlite+aiosqlite:///x", "data_dir": Path("/d"), "run_dir": Path("/r")}
    settings = Settings(**where, image_policy=policy, image_keys=(Path("/k"),))
    given: Any = (Rows(), Deployments(), Reconciler(), None)
    return Terminals(*given, settings, "owner", ManualClock(NOW))


async def create(policy: str, image: str) -> None:
    made = terminals(policy)
    await made.create(CALLER, "deployments/iris", replica="", service="", command=[], tty=False, image=image)


async def attach(policy: str) -> None:
    async def silent() -> AsyncIterator[Input]:
        for _ in range(0):
            yield Input()

    async for _ in terminals(policy).attach(CALLER, "deployments/iris/terminals/t1", (80, 24), silent()):
        pass


async def test_where_only_signed_images_run_no_other_comes_beside_a_replica() -> None:
    for refused in (create("enforce", "tools:1"), attach("enforce")):
        with pytest.raises(FailedPrecondition, match="tools:1") as caught:
            await refused
        assert caught.value.reason == "IMAGE_NOT_SIGNED"
    for allowed in (create("enforce", ""), create("warn", "tools:1"), create("off", "tools:1"), attach("warn")):
        with pytest.raises(Reached):
            await allowed
