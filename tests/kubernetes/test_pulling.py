"""The Secret with which nodes log in where they pull the platform's images, on a real cluster."""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

import pytest

from ekiben.errors import Unavailable
from services.deployer.runtimes.kubernetes.api import Api, open_api
from services.deployer.runtimes.kubernetes.caches import Cache
from services.deployer.runtimes.kubernetes.names import INSTALLATION, Where
from services.deployer.runtimes.kubernetes.pulling import Login, Logins, PullSecret
from services.kernel.clock import ManualClock
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.fixtures_kernel import until

HOST = "images.example.com:5000"
DAY = 86400


class Builder:
    """Who gives tokens."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.away = self.killed = False
        self.clock = ManualClock()

    async def issue(self, organization: str, lifetime: timedelta) -> Login:
        if self.away:
            raise Unavailable("The builder is away.", reason="UNAVAILABLE")
        self.given.append(f"{organization}-{len(self.given)}")
        if self.killed:
            raise SystemError("killed")
        return Login(self.given[-1], self.clock.now() + lifetime)


@pytest.fixture(scope="module")
def where(cluster: Cluster) -> Iterator[Where]:
    with new_namespace(cluster, "pulling") as name:
        yield Where(os.urandom(4).hex(), name)


@pytest.fixture
async def api(cluster: Cluster, where: Where) -> AsyncIterator[Api]:
    async with open_api(cluster.kubeconfig, "", where.namespace) as api:
        yield api


async def test_logins_are_made_renewed_in_place_and_taken_away(cluster: Cluster, where: Where, api: Api) -> None:
    builder = Builder()
    logins = Logins(builder.issue, timedelta(days=1))

    def opened() -> PullSecret:
        return PullSecret(api, where, HOST, logins, cache, builder.clock)

    def live() -> dict[str, str]:
        found = cluster.get("secrets", "-n", where.namespace, secret.name)
        uids.add(found["metadata"]["uid"])
        auths = json.loads(base64.b64decode(found["data"][".dockerconfigjson"]))["auths"]
        return {place: auth["password"] for place, auth in auths.items()}

    def watched() -> Cache:
        return Cache(api, "Secret", f"{INSTALLATION}={where.installation}", lambda kind, item: None, builder.clock)

    cache = watched()
    secret, uids = opened(), set[str]()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(cache.run())
        await cache.filled.wait()
        await secret.look({"default"})
        await secret.look({"default"})
        assert live() == {f"{HOST}/default": "default-0"} and secret.serves("default") and not secret.serves("other")
        assert secret.due_s() == DAY / 2
        await builder.clock.advance(DAY / 2 + 1)
        await secret.look({"default", "other"})
        assert live() == {f"{HOST}/default": "default-1", f"{HOST}/other": "other-2"}
        # A builder that is away costs nothing while the old token works.
        builder.away = True
        await builder.clock.advance(DAY / 2 + 1)
        await secret.look({"default", "other"})
        assert "The builder is away" in secret.fault and secret.serves("default") and len(builder.given) == 3
        assert secret.due_s() == 1.0
        builder.away = False
        await builder.clock.advance(1)
        await secret.look({"default", "other"})
        assert (secret.fault, set(live().values())) == ("", {"default-3", "other-4"})
        assert len(uids) == 1
        # By hand it is taken away, and comes back.
        cluster.kubectl("delete", "secret", "-n", where.namespace, secret.name)
        await until(lambda: not cache.objects, "the watch tells of it")
        await secret.look({"default", "other"})
        assert len(live()) == 2
        running.cancel()

    # Another process trusts no token that it did not ask for; those of organizations that it was not told of stay.
    cache = watched()
    secret = opened()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(cache.run())
        await cache.filled.wait()
        before = live()
        # The process ends between the token and the Secret: what is there goes on, and the next one asks anew.
        builder.killed = True
        with pytest.raises(SystemError):
            await secret.look({"default"})
        builder.killed = False
        assert live() == before
        await secret.look({"default"})
        assert live()[f"{HOST}/other"] == before[f"{HOST}/other"] and live()[f"{HOST}/default"] == builder.given[-1]
        await secret.remove()
        await secret.look(set())
        assert not cluster.get("secrets", "-n", where.namespace)["items"]
        running.cancel()
