"""The real `bentoml` commands 1.4, 1.1 and 1.0 against the front and a real registry."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.bentoml_clients import client, environment
from tests.fixtures_http import Front, front, running_front

__all__ = ["front"]

VERSIONS = ("1.4", "1.1", "1.0")
BENTOS = Path(__file__).resolve().parent.parent / "bentos"
OLD_MODEL = """
import bentoml, os
from bentoml._internal.models.model import ModelContext
context = ModelContext(framework_name='custom', framework_versions={})
with bentoml.models.create('weights', module='json', api_version='v1', signatures={}, context=context) as m:
    open(os.path.join(m.path, 'w.txt'), 'w').write('7')
print(m.tag)
"""


@dataclass
class BentoMl:
    """One client with its own store and login."""

    version: str
    home: Path

    async def run(self, *command: str, cwd: Path | None = None, stdin: str = "") -> tuple[int, str]:
        """Run a program of the client's environment; its status and all it printed."""
        process = await asyncio.create_subprocess_exec(
            client(self.version) / command[0],
            *command[1:],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(self.home),
            cwd=cwd,
        )
        async with asyncio.timeout(120):
            out, _ = await process.communicate(stdin.encode())
        return process.returncode or 0, out.decode(errors="replace")

    async def __call__(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run `bentoml`, which must succeed."""
        status, out = await self.run("bentoml", *arguments, cwd=cwd)
        assert status == 0, out
        return out

    async def login(self, front: Front) -> str:
        """Log in with the admin's token."""
        return await self("cloud", "login", "--endpoint", front.url, "--api-token", front.token)


@dataclass(frozen=True)
class Store:
    """What a client has built: a bento and a model."""

    home: Path
    bento: str
    model: str

    def copy(self, version: str, to: Path) -> BentoMl:
        """A client with a copy of it."""
        shutil.copytree(self.home, to)
        return BentoMl(version, to)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """A bento and a model built by each client."""

    async def build(version: str) -> Store:
        bentoml = BentoMl(version, tmp_path_factory.mktemp(f"store-{version}"))
        if version == "1.4":
            status, out = await bentoml.run("python", "make_model.py", "2", cwd=BENTOS / "modelled")
            built = await bentoml("build", ".", cwd=BENTOS / "modelled")
        else:
            status, out = await bentoml.run("python", "-c", OLD_MODEL)
            built = await bentoml("build", ".", cwd=BENTOS / "legacy")
        assert status == 0, out
        tag = re.search(r'tag="?([a-z0-9_-]+:[a-z0-9]+)', built)
        assert tag, built
        return Store(bentoml.home, tag[1], out.strip().splitlines()[-1])

    async def build_all() -> list[Store]:
        return [await build(version) for version in VERSIONS]

    return dict(zip(VERSIONS, asyncio.run(build_all()), strict=True))


@pytest.fixture(scope="module", params=["presigned", "multipart", "proxy"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["files", "s3"])
async def moving(strategy: str, version: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Front]:
    """A front which moves archives in the way under test; straight to and from a bucket in some."""
    blobs_url = ""
    if request.param == "s3":
        if (strategy, version) not in (("presigned", "1.4"), ("presigned", "1.0"), ("proxy", "1.4")):
            pytest.skip("the same requests to the bucket as in another of these")
        blobs_url = request.getfixturevalue("s3").new_url()
    async with running_front(tmp_path / "data", upload_strategy=strategy, blobs_url=blobs_url) as running:
        yield running


def contents(home: Path, kind: str, tag: str) -> dict[str, bytes]:
    """Every file of a bento or a model in a store."""
    root = home / kind / tag.replace(":", "/")
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


async def get(front: Front, path: str) -> dict[str, object]:
    """What the API says."""
    async with aiohttp.ClientSession(front.url, headers=front.headers) as session, session.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


@pytest.mark.parametrize("version", VERSIONS)
async def test_push_and_pull(stores: dict[str, Store], moving: Front, tmp_path: Path, version: str) -> None:
    store = stores[version]
    bentoml = store.copy(version, tmp_path / "home")
    assert "default" in await bentoml.login(moving)
    repository, id_ = store.bento.split(":")

    out = await bentoml("push", store.bento)
    assert "Successfully pushed" in out, out
    bento = await get(moving, f"/v1/bentoRepositories/{repository}/bentos/{id_}")
    assert bento["content"]["state"] == "READY"  # type: ignore[index]
    again = await bentoml("push", store.bento)
    assert "Successfully pushed" not in again
    forced = await bentoml("push", "--force", store.bento)
    assert "Successfully pushed" in forced, forced
    assert "Successfully pushed" in await bentoml("models", "push", "--force", store.model)

    fresh = BentoMl(version, tmp_path / "fresh")
    await fresh.login(moving)
    await fresh("pull", store.bento)
    assert contents(fresh.home, "bentos", store.bento) == contents(bentoml.home, "bentos", store.bento)
    if version != "1.0":  # whose `models pull` fails before it asks anybody
        await fresh("models", "pull", *(["--force"] if version == "1.4" else []), store.model)
        assert contents(fresh.home, "models", store.model) == contents(bentoml.home, "models", store.model)


async def test_the_manifest_is_kept_to_the_letter(stores: dict[str, Store], front: Front, tmp_path: Path) -> None:
    store = stores["1.4"]
    bentoml = store.copy("1.4", tmp_path / "home")
    await bentoml.login(front)
    await bentoml("push", store.bento)
    script = (
        "import bentoml\n"
        "from bentoml._internal.configuration.containers import BentoMLContainer as C\n"
        f"b = bentoml.get({store.bento!r})\n"
        f"r = C.bentocloud_client.get().bento.get(*{store.bento.split(':')!r})\n"
        "print('equal', r.manifest == b.get_manifest(), r.manifest.name, r.name == r.version)\n"
    )
    status, out = await bentoml.run("python", "-c", script)
    assert status == 0, out
    assert f"equal True {store.bento.split(':')[0]} True" in out


async def test_all_versions_are_listed_and_the_latest_is_found(
    stores: dict[str, Store], front: Front, tmp_path: Path
) -> None:
    store = stores["1.4"]
    bentoml = store.copy("1.4", tmp_path / "home")
    await bentoml.login(front)
    await bentoml("push", store.bento)
    status, second = await bentoml.run("python", "make_model.py", "3", cwd=BENTOS / "modelled")
    assert status == 0, second
    newest = second.strip().splitlines()[-1]
    await bentoml("models", "push", newest)
    script = (
        "import bentoml\n"
        "from bentoml._internal.configuration.containers import BentoMLContainer as C\n"
        "c = C.bentocloud_client.get()\n"
        "print('bentos', [f'{i.repository.name}:{i.version}' for i in c.bento.list().items])\n"
        "print('models', [f'{i.repository.name}:{i.version}' for i in c.model.list().items])\n"
        f"print('latest', c.model.get('weights').version, c.bento.get({store.bento.split(':')[0]!r}, None).version)\n"
    )
    status, out = await bentoml.run("python", "-c", script)
    assert status == 0, out
    assert f"bentos {[store.bento]!r}" in out
    assert f"models {[newest, store.model]!r}" in out
    assert f"latest {newest.split(':')[1]} {store.bento.split(':')[1]}" in out

    fresh = BentoMl("1.4", tmp_path / "fresh")
    await fresh.login(front)
    await fresh("models", "pull", "weights")
    assert contents(fresh.home, "models", newest) == contents(bentoml.home, "models", newest)
    await fresh("models", "pull", "weights")  # compares times of both sides
    await fresh("pull", store.bento.split(":")[0] + ":latest")
    assert contents(fresh.home, "bentos", store.bento)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_bad_token_is_refused(front: Front, tmp_path: Path, version: str) -> None:
    bentoml = BentoMl(version, tmp_path / "home")
    status, out = await bentoml.run(
        "bentoml", "cloud", "login", "--endpoint", front.url, "--api-token", "ekb_" + "x" * 40
    )
    assert status != 0
    assert "401" in out or "token" in out.lower()


async def test_secrets_and_tokens(front: Front, tmp_path: Path) -> None:
    bentoml = BentoMl("1.4", tmp_path / "home")
    await bentoml.login(front)
    await bentoml("secret", "create", "hf", "HF_TOKEN=top-secret", "OTHER=x", "--description", "for the hub")
    async with aiohttp.ClientSession(front.url, headers=front.headers) as session:
        for n in range(11):  # the client asks for ten, and for all
            body = {"name": f"secrets/more-{n}", "items": [{"key": "A", "value": "b"}]}
            async with session.post("/v1/secrets", json=body) as answer:
                assert answer.status == 200, await answer.text()
    listed = json.loads(await bentoml("secret", "list", "-o", "json"))
    assert len(listed) == 12
    assert "top-secret" not in json.dumps(listed)
    await bentoml("secret", "apply", "hf", "HF_TOKEN=new")
    (hf,) = json.loads(await bentoml("secret", "list", "--search", "hf", "-o", "json"))
    assert [item["key"] for item in hf["content"]["items"]] == ["HF_TOKEN"]
    await bentoml("secret", "delete", "hf")
    status, out = await bentoml.run("bentoml", "secret", "apply", "hf", "A=b")
    assert (status, "Secret not found" in out) == (1, True)

    made = await bentoml("api-token", "create", "ci", "--expires", "1d", "-s", "read_organization", "-o", "json")
    assert "ekb_" in made
    tokens = json.loads(await bentoml("api-token", "list", "-o", "json"))
    assert "ci" in [token["name"] for token in tokens]
    uid = next(token["uid"] for token in tokens if token["name"] == "ci")
    assert "ci" in await bentoml("api-token", "get", uid)
    await bentoml("api-token", "delete", uid)
    assert "ci" not in [token["name"] for token in json.loads(await bentoml("api-token", "list", "-o", "json"))]


async def test_deployments(stores: dict[str, Store], front: Front, tmp_path: Path) -> None:
    store = stores["1.4"]
    bentoml = store.copy("1.4", tmp_path / "home")
    await bentoml.login(front)
    out = await bentoml("deploy", store.bento, "-n", "web", "--scaling-min", "2", "--scaling-max", "3", "--env", "A=1")
    assert "is ready" in out, out
    shown = json.loads(await bentoml("deployment", "get", "web", "-o", "json"))
    assert shown["bento"] == store.bento
    assert shown["config"]["services"]["Modelled"]["scaling"]["max_replicas"] == 3
    assert shown["config"]["envs"] == [{"name": "A", "value": "1"}]
    kept = front.deployments.kept["deployments/web"]
    kept.template.services["Modelled"].pod.node_selector["disk"] = "ssd"  # Of which the client knows nothing.
    await bentoml("deployment", "update", "web", "--instance-type", "cpu.small")
    assert dict(kept.template.services["Modelled"].pod.node_selector) == {"disk": "ssd"}
    assert kept.template.services["Modelled"].instance_type == "cpu.small"
    assert [env.name for env in kept.template.envs] == ["A"]
    listed = json.loads(await bentoml("deployment", "list", "-o", "json"))
    assert [each["name"] for each in listed] == ["web"]
    types = json.loads(await bentoml("deployment", "list-instance-types", "-o", "json"))
    assert types[0]["name"] == "cpu.small"
    await bentoml("deployment", "terminate", "web", "--wait")
    await bentoml("deployment", "update", "web")
    assert kept.state == kept.RUNNING
    await bentoml("deployment", "delete", "web")
    status, out = await bentoml.run("bentoml", "deployment", "get", "web")
    assert status != 0
    assert "web" in out


async def test_remote_bentos_are_deployed_without_a_version(
    stores: dict[str, Store], front: Front, tmp_path: Path
) -> None:
    for version in ("1.4", "1.1"):
        store = stores[version]
        pusher = store.copy(version, tmp_path / f"home-{version}")
        await pusher.login(front)
        await pusher("push", store.bento)
        name = store.bento.split(":")[0]
        other = BentoMl("1.4", tmp_path / f"other-{version}")
        await other.login(front)
        for tag in (name, f"{name}:latest", store.bento):
            await other("deployment", "create", tag, "-n", f"{name}-{len(front.deployments.kept)}")
    assert len(front.deployments.kept) == 6
    services = {name for kept in front.deployments.kept.values() for name in kept.template.services}
    assert "" not in services


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_old_clients_read_and_write_deployments(
    stores: dict[str, Store], front: Front, tmp_path: Path, version: str
) -> None:
    store = stores[version]
    bentoml = store.copy(version, tmp_path / "home")
    await bentoml.login(front)
    await bentoml("push", store.bento)
    script = (
        "import bentoml\n"
        "from bentoml._internal.cloud.deployment import Deployment as D\n"
        f"print(D.create('old', {store.bento!r}).status)\n"
        "print([d.name for d in D.list().items])\n"
        f"print(D.get('old').latest_revision.targets[0].bento.version == {store.bento.split(':')[1]!r})\n"
        "print(D.terminate('old').status)\n"
        "print(D.delete('old').name)\n"
    )
    status, out = await bentoml.run("python", "-c", script)
    assert status == 0, out
    assert "DeploymentStatus.Running" in out.replace("DeploymentStatus.Running: 'running'", "DeploymentStatus.Running")
    assert "['old']" in out
    assert "True" in out
    assert not front.deployments.kept


async def test_a_codespace_is_refused_in_words(front: Front, tmp_path: Path) -> None:
    headers = {"X-YATAI-API-TOKEN": front.token}
    async with aiohttp.ClientSession(front.url, headers=headers) as session:
        async with session.get("/api/v2/deployments/dev/files?cluster=") as answer:
            assert answer.status == 501
            assert "Codespaces" in (await answer.json())["error"]
