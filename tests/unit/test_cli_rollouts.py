"""What is said while a deployment is followed."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from ekiben.cli import rollouts
from ekiben.deployer.v1 import deployer_pb2 as pb


async def test_who_interrupts_is_told_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    shown = asyncio.Event()

    async def follow(name: str, timeout_s: float) -> AsyncIterator[pb.Deployment]:
        yield pb.Deployment(name=name, state=pb.Deployment.DEPLOYING)
        shown.set()
        await asyncio.Event().wait()

    client: Any = SimpleNamespace(deployments=SimpleNamespace(follow=follow))
    following = asyncio.create_task(rollouts.follow(client, "deployments/demo", 60))
    await shown.wait()
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    assert "demo goes on without you: `ekiben deployments wait demo`" in capsys.readouterr().err
