"""Which images may be put beside a replica, by who signed them: in a real registry."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition, NotFound
from services.content import open_images
from services.content.attestations import keys, signing
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore
from services.deployer.attachments import Input
from services.deployer.domain import Terminal
from services.deployer.gate import Gate
from services.deployer.settings import Settings
from services.deployer.terminals import Terminals
from services.kernel.clock import ManualClock
from services.kernel.identity import Principal
from tests.image_content import put_image
from tests.oci_registry import OciRegistry

NOW = datetime(2027, 1, 1, tzinfo=UTC)
KEY = keys.generate()
CALLER = Principal("u", "default", Role.ROLE_DEVELOPER)


class Reached(Exception):
    """What is behind the checks was asked."""


class Rows:
    """One terminal that was asked for before the deployer started anew, with another policy."""

    def __init__(self, image: str) -> None:
        self._image = image

    async def get(self, organization: str, deployment: str, terminal: str) -> Terminal:
        image = self._image
        return Terminal(terminal, organization, deployment, "uid", "r", "S", (), False, image, "u", "PENDING", NOW)

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


def terminals(policy: str, public: Path, image: str) -> Terminals:
    where: Any = {"database_url": "sqlite+aiosqlite:///x", "data_dir": Path("/d"), "run_dir": Path("/r")}
    gate = None if policy == "off" else Gate(policy, [public], [], ManualClock(NOW))
    nothing: Any = None
    rows, deployments, reconciler = cast("Any", Rows(image)), cast("Any", Deployments()), cast("Any", Reconciler())
    return Terminals(rows, deployments, reconciler, nothing, Settings(**where), "owner", ManualClock(NOW), gate)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    (tmp_path / "our.pub").write_bytes(keys.public_pem(KEY.public_key()))
    return tmp_path / "our.pub"


async def push(folder: Path, name: str, *, signed: bool) -> str:
    """Put an image into a registry. Gives its digest."""
    await put_image(folder, "default/tools:v1", {"weights": str(folder).encode()})
    async with open_images(f"docker://{name}") as (store, tag):
        copied = await copy_image(LayoutImageStore(folder), "default/tools:v1", store, tag)
        if signed:
            await signing.sign(store, copied, signing.by_key(KEY))
    return str(copied.digest)


async def create(made: Terminals, image: str) -> None:
    await made.create(CALLER, "deployments/iris", replica="", service="", command=[], tty=False, image=image)


async def attach(made: Terminals) -> None:
    async def silent() -> AsyncIterator[Input]:
        for _ in range(0):
            yield Input()

    async for _ in made.attach(CALLER, "deployments/iris/terminals/t1", (80, 24), silent()):
        pass


async def test_where_only_signed_images_run_no_other_comes_beside_a_replica(
    oci_registry: OciRegistry, tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    plain = f"{oci_registry.host}/{oci_registry.new_repository()}:v1"
    await push(tmp_path / "images", plain, signed=False)
    enforcing = terminals("enforce", public, plain)
    for refused in (create(enforcing, plain), attach(enforcing)):
        with pytest.raises(FailedPrecondition) as caught:
            await refused
        assert caught.value.reason == "IMAGE_NOT_SIGNED"
    with pytest.raises(NotFound, match="v2"):
        await create(enforcing, plain.replace(":v1", ":v2"))
    with pytest.raises(Reached):
        await create(enforcing, "")  # The replica's own.
    for policy in ("warn", "off"):
        lax = terminals(policy, public, plain)
        for allowed in (create(lax, plain), attach(lax)):
            with pytest.raises(Reached):
                await allowed


async def test_a_signed_image_comes_beside_a_replica_as_it_was_when_it_was_looked_at(
    oci_registry: OciRegistry, tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    name = f"{oci_registry.host}/{oci_registry.new_repository()}:v1"
    digest = await push(tmp_path / "images", name, signed=True)
    enforcing = terminals("enforce", public, name)
    for allowed in (create(enforcing, name), attach(enforcing)):
        with pytest.raises(Reached):
            await allowed
    kept = await enforcing._trusted(name)
    assert kept == f"{name.removesuffix(':v1')}@{digest}"
    await push(tmp_path / "other", name, signed=False)  # The tag moves.
    assert await enforcing._trusted(kept) == kept
    with pytest.raises(FailedPrecondition):
        await enforcing._trusted(name)
    public.write_bytes(keys.public_pem(keys.generate().public_key()))  # The key is trusted no more.
    with pytest.raises(FailedPrecondition):
        await enforcing._trusted(kept)
