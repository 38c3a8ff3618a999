"""The runtimes of clusters that somebody added: one that fails ends nobody else's."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import InvalidArgument
from services.content.sealing import Sealing
from services.deployer.clusters import Clusters
from services.deployer.domain import Cluster
from services.deployer.runtimes.kubernetes.api import open_api
from services.deployer.runtimes.several import SeveralRuntimes
from services.kernel.clock import ManualClock
from services.kernel.settings import SettingsError
from tests.places import Place


class Rows:
    """The store, as far as runtimes need it."""

    def __init__(self, *clusters: Cluster) -> None:
        self.clusters = list(clusters)

    async def list_clusters(self) -> Sequence[Cluster]:
        return list(self.clusters)


def cluster(name: str, **more: Any) -> Cluster:
    return Cluster(name, f"uid-of-{name}", datetime(2026, 1, 1, tzinfo=UTC), namespaces=("one",), **more)


def no_key() -> Sealing:
    raise AssertionError("nothing here is sealed")


async def test_a_fault_of_one_cluster_leaves_the_others_their_runtimes(manual_clock: ManualClock) -> None:
    opened = asyncio.Event()

    @asynccontextmanager
    async def open_runtime(of: Cluster, namespace: str, config: dict[str, Any] | None) -> AsyncIterator[Any]:
        if of.name == "broken":
            raise KeyError("a fault of ours, or a library's")
        opened.set()
        yield Place(of.name)

    several: Any = SeveralRuntimes(Place("own"))  # type: ignore[arg-type]
    store: Any = Rows(cluster("broken"), cluster("whole"))
    running = asyncio.create_task(Clusters(store, no_key, several, manual_clock).run(open_runtime))
    async with asyncio.timeout(30):
        await opened.wait()
        await asyncio.sleep(0)
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize("authority", ["not base64", base64.b64encode(b"no certificate").decode()])
async def test_a_kubeconfig_of_before_that_cannot_be_used_is_words_and_no_crash(authority: str) -> None:
    kept = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": "https://x", "certificate-authority-data": authority}}],
        "users": [{"name": "x", "user": {"token": "t"}}],
    }
    with pytest.raises(SettingsError, match="no way to a cluster"):
        async with open_api(kept, "", "one"):
            raise AssertionError("it was opened")


class Slow(Place):
    """A runtime that knows what is there once it is told so."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.known = asyncio.Event()
        self.wrong = ""

    def fault(self) -> str:
        return self.wrong

    async def filled(self) -> None:
        await self.known.wait()


async def test_other_credentials_take_over_once_they_show_what_is_there(manual_clock: ManualClock) -> None:
    places = {name: Slow(name) for name in ("first", "wrong", "second")}
    opened = {name: asyncio.Event() for name in places}
    renewed = asyncio.Event()

    @asynccontextmanager
    async def open_runtime(of: Cluster, namespace: str, config: dict[str, Any] | None) -> AsyncIterator[Any]:
        opened[of.pull_host].set()
        yield places[of.pull_host]

    several: Any = SeveralRuntimes(Place("own"))  # type: ignore[arg-type]
    several.renewed = renewed.set
    rows: Any = Rows(cluster("there", pull_host="first"))
    clusters = Clusters(rows, no_key, several, manual_clock)
    running = asyncio.create_task(clusters.run(open_runtime))
    async with asyncio.timeout(30):
        await opened["first"].wait()
        for name in ("wrong", "second"):
            rows.clusters = [cluster("there", pull_host=name)]
            clusters._signal.notify()
            await opened[name].wait()
            assert several._runtimes["there/one"] is places["first"] and not renewed.is_set()
        places["second"].known.set()
        await renewed.wait()
        assert several._runtimes["there/one"] is places["second"]
        rows.clusters = []
        clusters._signal.notify()
        await several.changed()
        assert "there/one" not in several._runtimes
    running.cancel()
    await asyncio.wait([running])


async def test_credentials_that_do_not_take_over_are_told_and_the_ones_before_serve_on(
    manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    places = {name: Slow(name) for name in ("first", "wrong", "unread")}
    opened, renewed = {name: asyncio.Event() for name in places}, asyncio.Event()

    @asynccontextmanager
    async def open_runtime(of: Cluster, namespace: str, config: dict[str, Any] | None) -> AsyncIterator[Any]:
        opened[of.pull_host].set()
        if of.pull_host == "unread":
            raise SettingsError(["there is no way to a cluster."])
        yield places[of.pull_host]

    several: Any = SeveralRuntimes(Place("own"))  # type: ignore[arg-type]
    several.renewed = renewed.set
    rows: Any = Rows(cluster("there", pull_host="first"))
    clusters = Clusters(rows, no_key, several, manual_clock)
    running = asyncio.create_task(clusters.run(open_runtime))

    async def give(name: str) -> None:
        rows.clusters = [cluster("there", pull_host=name)]
        clusters._signal.notify()
        await opened[name].wait()

    async def told(words: str) -> None:
        while words not in clusters.detail(rows.clusters[0]):
            await manual_clock.advance(10)
            await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await opened["first"].wait()
        await give("wrong")
        assert clusters.detail(rows.clusters[0]) == ""
        await told("In the namespace one the new credentials have not taken over: the cluster has not answered yet.")
        places["wrong"].wrong = "Unauthorized."
        await told("taken over: Unauthorized. `ekiben clusters check there` says")
        assert clusters.detail(cluster("another")) == ""
        while not any("Unauthorized." in str(record.__dict__.get("error")) for record in caplog.records):
            await manual_clock.advance(10)
            await asyncio.sleep(0)
        assert several._runtimes["there/one"] is places["first"] and not renewed.is_set()
        await give("unread")
        await told("The namespace one cannot be reached: there is no way to a cluster.")
        assert "Unauthorized" not in clusters.detail(rows.clusters[0])
        await give("wrong")
        places["wrong"].known.set()
        await renewed.wait()
        assert clusters.detail(rows.clusters[0]) == ""
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize("host", ["registry..example.com", ":::", "example.com:123456", "[::1", "a" * 300, "a.b/c"])
async def test_a_host_that_is_none_is_refused(host: str, manual_clock: ManualClock) -> None:
    clusters = Clusters(Rows(), no_key, SeveralRuntimes(Place("own")), manual_clock)  # type: ignore[arg-type]
    for field, given in (("pull_host", host), ("otlp_http_endpoint", f"http://{host}")):
        sent = pb.Cluster(name="clusters/there", **{field: given})  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument) as refused:
            await clusters.create(sent)
        assert refused.value.violations[0][0] == f"cluster.{field}"
