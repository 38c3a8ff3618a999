"""An organization from one platform to another: killed, repeated, damaged, and against what is there already."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ekiben
from ekiben import exports
from ekiben.errors import DataLoss, FailedPrecondition
from ekiben.identity.v1 import identity_pb2
from ekiben.registry.v1 import registry_pb2
from tests.platform import BIN, Platform, running, wait_for
from tests.standalone.test_operations import model


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Platform]:
    """A second platform, empty."""
    with running(tmp_path / "other") as platform:
        yield platform


def bento(folder: Path, version: str) -> Path:
    path = folder / version
    (path / "src").mkdir(parents=True)
    (path / "bento.yaml").write_text(
        f"service: service:Svc\nname: exported\nversion: {version}\nbentoml_version: 1.4.0\n"
        "creation_time: '2026-01-01T00:00:00+00:00'\nmodels: []\n"
    )
    (path / "src" / "service.py").write_text("import bentoml\n")
    return path


def killed_after_the_first_archive(platform: Platform, folder: Path, *command: str) -> None:
    process = subprocess.Popen([BIN / "ekiben", "admin", *command], env=platform.client_env(), stderr=subprocess.PIPE)
    wait_for("an archive", lambda: [p for p in folder.glob("blobs/sha256/*/*") if len(p.name) == 64], 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_an_organization_moves_to_another_installation(platform: Platform, other: Platform, tmp_path: Path) -> None:
    folder = tmp_path / "export"

    async def fill() -> None:
        async with ekiben.Client(platform.url, platform.token) as client:
            for number in range(4):
                await client.models.push(
                    model(tmp_path / "models", f"e{number}", os.urandom(2 << 20)), labels={"n": str(number)}
                )
            described = registry_pb2.Model(name="modelRepositories/ops/models/e1", description="é \u2028 one")
            described.annotations["note"] = "kept"
            await client.models.update(described)
            await client.bentos.push(bento(tmp_path / "bentos", "e1"))
            await client.models.create("modelRepositories/ops/models/empty")
            await client.aliases.set(
                "modelRepositories/ops/aliases/exported", "modelRepositories/ops/models/e2", reason="first"
            )
            await client.users.create(identity_pb2.User(name="users/eve", role=2, email="eve@example.com"))  # type: ignore[arg-type]
            item = identity_pb2.Secret.Item(key="KEY", value="hidden")
            await client.secrets.create(identity_pb2.Secret(name="secrets/exported", items=[item]))

    asyncio.run(fill())
    with pytest.raises(FailedPrecondition, match="holds no whole export"):
        asyncio.run(_import(other, folder))
    killed_after_the_first_archive(platform, folder, "export", str(folder))
    done = platform.ekiben("admin", "export", str(folder))
    assert "were there" in done.stderr and "have no content" in done.stderr
    assert "hidden" not in "".join(path.read_text() for path in folder.glob("*.json*"))

    imported = other.ekiben("admin", "import", str(folder), "--users")
    (told,) = [line for line in imported.stderr.splitlines() if line.startswith("Write these secrets by hand: ")]
    assert "exported" in told.removeprefix("Write these secrets by hand: ").rstrip(".").split(", ")
    source, target = (asyncio.run(_everything(one)) for one in (platform, other))
    assert {name: one for name, one in source.items() if name in target} == target
    left = {name for name in set(source) - set(target) if name.startswith("modelRepositories/ops/")}
    assert left == {"modelRepositories/ops/models/empty"}
    assert target["modelRepositories/ops/models/e1"][1] == "é \u2028 one"
    again = asyncio.run(_import(other, folder))
    assert (again.made, again.there, again.failures) == (0, len(target), {})

    async def differ() -> None:
        async with ekiben.Client(other.url, other.token) as client:
            alias = await client.aliases.get("modelRepositories/ops/aliases/exported")
            assert alias.version.endswith("/e2")
            latest = await client.models.get("modelRepositories/ops/models/latest")
            assert latest.name == sorted(name for name in target if "models/" in name and "ops" in name)[-1]
            assert (await client.users.get("users/eve")).email == "eve@example.com"
            moved = await client.models.get("modelRepositories/ops/models/e1")
            assert moved.annotations["note"] == "kept"
            assert moved.annotations[f"{exports.ORIGIN}creator"] == "users/admin"
            await client.aliases.set("modelRepositories/ops/aliases/exported", "modelRepositories/ops/models/e1")
            await client.models.delete("modelRepositories/ops/models/e0")
            await client.models.push(model(tmp_path / "different", "e0", b"other"))
            await client.models.delete("modelRepositories/ops/models/e3")

    asyncio.run(differ())
    digest = source["modelRepositories/ops/models/e3"][0].removeprefix("sha256:")
    archive = folder / "blobs" / "sha256" / digest[:2] / digest
    good = archive.read_bytes()
    archive.write_bytes(good[:-1] + b"x")
    refused = asyncio.run(_import(other, folder))
    assert set(refused.failures) == {
        "modelRepositories/ops/models/e0",
        "modelRepositories/ops/models/e3",
        "modelRepositories/ops/aliases/exported",
    }
    assert "with other content" in refused.failures["modelRepositories/ops/models/e0"]
    assert "damaged" in refused.failures["modelRepositories/ops/models/e3"]
    archive.write_bytes(good)
    mended = other.ekiben("admin", "import", str(folder), check=False)
    assert mended.returncode == 1 and "ops:e3" not in mended.stderr
    assert asyncio.run(_everything(other))["modelRepositories/ops/models/e3"][0] == f"sha256:{digest}"
    versions = folder / "versions.jsonl"
    versions.write_text(versions.read_text()[:-2])
    with pytest.raises(DataLoss, match="Export again"):
        asyncio.run(_import(other, folder))


async def _import(platform: Platform, folder: Path) -> exports.Imported:
    async with ekiben.Client(platform.url, platform.token) as client:
        return await exports.import_from(client, folder)


async def _everything(platform: Platform) -> dict[str, tuple[str, str, dict[str, str], str]]:
    async with ekiben.Client(platform.url, platform.token) as client:
        found = [*[one async for one in client.models.list()], *[one async for one in client.bentos.list()]]
        return {one.name: (one.content.digest, one.description, dict(one.labels), one.manifest) for one in found}
