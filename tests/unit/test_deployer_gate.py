"""Which images a deployer runs, by who signed them."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ekiben.errors import EkibenError, FailedPrecondition, Unavailable
from services.content.attestations import attachments, envelopes, keys, signing, verification
from services.content.attestations.verification import Trust
from services.content.images import INDEX, MANIFEST, REF_NAME, Descriptor, Platform, canonical
from services.content.images.layout import LayoutImageStore
from services.deployer import status
from services.deployer.domain import MAIN, Condition, Status
from services.deployer.gate import Gate, worst
from services.deployer.runtimes import Phase, ReplicaStatus, SetStatus
from services.deployer.settings import Settings
from services.deployer.status import Facts, ServiceFact
from services.kernel.clock import ManualClock
from services.kernel.settings import SettingsError, load
from tests.image_content import add_entries, put_blob, put_image
from tests.platform import free_port

NOW = datetime(2027, 1, 1, tzinfo=UTC)
KEY = keys.generate()


@pytest.fixture
def public(tmp_path: Path) -> Path:
    (tmp_path / "our.pub").write_bytes(keys.public_pem(KEY.public_key()))
    return tmp_path / "our.pub"


def gate(policy: str, *trusted: Path, identities: Sequence[str] = ()) -> Gate:
    return Gate(policy, trusted, identities, ManualClock(NOW))


async def image(tmp_path: Path, *, signed: bool) -> tuple[str, Descriptor]:
    folder = tmp_path / "layout"
    made = await asyncio.to_thread(lambda: asyncio.run(put_image(folder, "acme/x:v1")))
    if signed:
        await signing.sign(LayoutImageStore(folder), made, signing.by_key(KEY))
    return f"oci:{folder}:acme/x:v1", made


async def test_a_signed_image_passes_and_its_signer_is_told(tmp_path: Path, public: Path) -> None:
    location, made = await image(tmp_path, signed=True)
    for policy in ("warn", "enforce"):
        told = await gate(policy, public).look(location, str(made.digest))
        assert told is not None and (told.type, told.status, told.reason) == ("Verified", True, "SIGNED")
        assert "our.pub" in told.message and str(made.digest) in told.message


async def test_what_is_mounted_must_be_in_the_index_that_is_signed(tmp_path: Path, public: Path) -> None:
    _, listed = await image(tmp_path, signed=False)
    folder = tmp_path / "layout"
    index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": [listed.to_json()]})
    named = replace(await put_blob(folder, index, INDEX), annotations={REF_NAME: "acme/x:apart"})
    await asyncio.to_thread(add_entries, folder, [named.to_json()])
    await signing.sign(LayoutImageStore(folder), named, signing.by_key(KEY))
    location, strange = f"oci:{folder}:acme/x:apart", f"sha256:{'0' * 64}"
    told = await gate("enforce", public).look(location, str(named.digest), [str(listed.digest)])
    assert told is not None and told.reason == "SIGNED"
    with pytest.raises(FailedPrecondition, match="is not in its index") as caught:
        await gate("enforce", public).look(location, str(named.digest), [str(listed.digest), strange])
    assert caught.value.reason == "IMAGE_SIGNATURE_REFUSED"


async def test_an_unsigned_image_is_refused_told_of_or_nobody_asks(tmp_path: Path, public: Path) -> None:
    location, made = await image(tmp_path, signed=False)
    with pytest.raises(FailedPrecondition) as caught:
        await gate("enforce", public).look(location, str(made.digest))
    assert caught.value.reason == "IMAGE_NOT_SIGNED" and "ekiben images sign" in caught.value.message
    told = await gate("warn", public).look(location, str(made.digest))
    assert told is not None and (told.status, told.reason) == (False, "IMAGE_NOT_SIGNED")
    assert "runs nevertheless" in told.message
    assert await gate("off").look(location, str(made.digest)) is None


async def test_it_is_the_digest_that_counts_whatever_the_tag_names_by_now(tmp_path: Path, public: Path) -> None:
    location, signed = await image(tmp_path, signed=True)
    _, unsigned = await image(tmp_path, signed=False)  # under the same tag
    assert await gate("enforce", public).look(location, str(signed.digest))
    with pytest.raises(FailedPrecondition):
        await gate("enforce", public).look(location, str(unsigned.digest))


@pytest.mark.parametrize("machine", ["here", "linux/s390x"])
async def test_an_index_must_be_signed_itself_since_the_engine_chooses_of_it(
    tmp_path: Path, public: Path, machine: str
) -> None:
    layout = tmp_path / "layout"
    made = [await put_image(layout, "") for _ in range(2)]
    good, evil = made
    platform = Platform.here() if machine == "here" else Platform.parse(machine)
    listed = [good.to_json(), replace(evil, platform=platform).to_json()]
    index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed})
    store = LayoutImageStore(layout)
    named = await store.tag("acme/x:v1", index, INDEX, None)
    await signing.sign(store, good, signing.by_key(KEY))
    location, asked = f"oci:{layout}:acme/x:v1", gate("enforce", public)
    with pytest.raises(FailedPrecondition) as caught:
        await asked.look(location, str(named.digest))
    assert caught.value.reason == "IMAGE_NOT_SIGNED"
    assert await asked.look(location, str(good.digest))
    await signing.sign(store, named, signing.by_key(KEY))
    assert await asked.look(location, str(named.digest))


async def test_an_image_for_other_machines_than_the_deployers_is_looked_at(tmp_path: Path, public: Path) -> None:
    layout = tmp_path / "layout"
    made = await put_image(layout, "acme/x:v1", platform=Platform("linux", "s390x"))
    await signing.sign(LayoutImageStore(layout), made, signing.by_key(KEY))
    assert await gate("enforce", public).look(f"oci:{layout}:acme/x:v1", str(made.digest))


async def test_a_key_is_trusted_for_its_repositories_and_distrusted_without_a_restart(
    tmp_path: Path, public: Path
) -> None:
    location, made = await image(tmp_path, signed=True)
    asked = gate("enforce", public)
    assert await asked.look(location, str(made.digest))
    pem = public.read_text()
    for line, words in (("images: other/*", "not for acme/x"), ("not-after: 2026-12-31", "expired")):
        public.write_text(f"{line}\n{pem}")
        with pytest.raises(FailedPrecondition, match=words):
            await asked.look(location, str(made.digest))
    public.write_text(f"images: acme/*\n{pem}")
    assert await asked.look(location, str(made.digest))
    public.unlink()
    with pytest.raises(FailedPrecondition) as caught:
        await asked.look(location, str(made.digest))
    assert caught.value.reason == "KEY_FILE_UNREADABLE"


async def test_what_cannot_be_looked_at_waits_or_runs_by_policy(
    tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr("services.content.attestations.verification.verify", _away)
    digest = f"sha256:{'ab' * 32}"
    with pytest.raises(EkibenError):
        await gate("enforce", public).look(f"docker://{nowhere}/acme/x:v1", digest)
    told = await gate("warn", public).look(f"docker://{nowhere}/acme/x:v1", digest)
    assert told is not None and (told.status, told.reason) == (None, "REGISTRY_UNAVAILABLE")


_DEEP, _ENDLESS = "[" * 100_000 + "]" * 100_000, "1e999"


@pytest.mark.parametrize(
    ("name", "value"),
    [("z", _DEEP), ("layers", f'[{{"digest": "", "size": {_ENDLESS}}}]')],
    ids=["nested deep", "an endless size"],
)
async def test_whatever_else_is_attached_the_signature_beside_it_counts(
    tmp_path: Path, public: Path, name: str, value: str
) -> None:
    location, made = await image(tmp_path, signed=True)
    layout = tmp_path / "layout"
    made_up = {"schemaVersion": 2, "mediaType": MANIFEST, "config": made.to_json(), "subject": made.to_json()}
    content = f'{json.dumps(made_up)[:-1]}, "{name}": {value}}}'.replace('"digest": ""', f'"digest": "{made.digest}"')
    blob = await put_blob(layout, content.encode(), MANIFEST)
    old = {**blob.to_json(), "annotations": {REF_NAME: f"acme/x:sha256-{made.digest.hex}.sig"}}
    add_entries(layout, [{**blob.to_json(), "artifactType": "x/y"}, old])
    bill = f'{{"z": {_DEEP}}}'.encode()
    await attachments.attach(LayoutImageStore(layout), made, envelopes.CYCLONEDX, bill)
    told = await gate("enforce", public).look(location, str(made.digest))
    assert told is not None and told.reason == "SIGNED"
    kinds = [each.kind for each in await verification.attested(LayoutImageStore(layout), made.digest, Trust(), NOW)]
    assert kinds == ["signature"]


async def test_a_layout_that_cannot_be_read_waits_or_runs_by_policy(tmp_path: Path, public: Path) -> None:
    (tmp_path / "file").write_text("no layout")
    location, digest = f"oci:{tmp_path}/file:acme/x:v1", f"sha256:{'ab' * 32}"
    told = await gate("warn", public).look(location, digest)
    assert told is not None and (told.status, told.reason) == (None, "IMAGE_NOT_LOOKED_AT")
    assert location in told.message and "runs nevertheless" in told.message
    with pytest.raises(Unavailable):
        await gate("enforce", public).look(location, digest)


async def _away(*_: object, **__: object) -> None:
    raise Unavailable("The registry does not answer.", reason="REGISTRY_UNAVAILABLE")


def facts(*, problem: Condition | None = None, verified: Condition | None = None) -> Facts:
    ready = (ReplicaStatus("iris-1", Phase.READY),)
    new = SetStatus("new", "deployments/iris", "u", 2, MAIN, "Iris", 1, () if problem else ready)
    service = ServiceFact(MAIN, "Iris", 1, True, complete=problem is None, new=new)
    return Facts(2, 2, (service,), problem=problem, verified=verified)


def test_a_refusal_and_a_warning_are_conditions_in_words() -> None:
    refused = Condition("Verified", False, "IMAGE_NOT_SIGNED", "sha256:ab has no signature.")
    summary = status.summarize(facts(problem=refused), Status("DEPLOYING"), NOW)
    by_type = {each.type: each for each in summary.conditions}
    assert summary.state == "FAILED"
    assert (by_type["Verified"].status, by_type["Verified"].reason) == (False, "IMAGE_NOT_SIGNED")
    assert by_type["Built"].status is True and by_type["Available"].reason == "IMAGE_NOT_SIGNED"
    summary = status.summarize(facts(verified=refused), Status("DEPLOYING"), NOW)
    assert summary.state == "RUNNING"
    assert {each.type: each.status for each in summary.conditions}["Verified"] is False
    summary = status.summarize(facts(), Status("DEPLOYING"), NOW)
    assert "Verified" not in {each.type for each in summary.conditions}


def test_of_several_targets_what_is_wrong_is_shown() -> None:
    good, bad, unknown = (Condition("Verified", each, "X") for each in (True, False, None))
    assert worst([good, unknown, bad]) is bad and worst([good, unknown]) is unknown and worst([]) is None


def test_a_policy_that_could_not_hold_stops_the_start(tmp_path: Path) -> None:
    given = {
        "EKIBEN_DEPLOYER_DATABASE_URL": "sqlite://",
        "EKIBEN_DEPLOYER_DATA_DIR": "/d",
        "EKIBEN_DEPLOYER_RUN_DIR": "/r",
    }
    good = {
        "EKIBEN_DEPLOYER_IMAGE_POLICY": "enforce",
        "EKIBEN_DEPLOYER_IMAGE_KEYS": "/a.pub,/b",
        "EKIBEN_DEPLOYER_RUNTIME": "podman",
    }
    assert load(Settings, "EKIBEN_DEPLOYER", given | good).image_keys == (Path("/a.pub"), Path("/b"))
    # Environments are refused, not the start: clusters that are added run images all the same.
    load(Settings, "EKIBEN_DEPLOYER", given | good | {"EKIBEN_DEPLOYER_RUNTIME": "process"})
    for wrong, words in (
        ({"EKIBEN_DEPLOYER_IMAGE_POLICY": "maybe"}, "must be off, warn or enforce"),
        ({"EKIBEN_DEPLOYER_IMAGE_KEYS": ""}, "whom to trust"),
    ):
        with pytest.raises(SettingsError, match=words):
            load(Settings, "EKIBEN_DEPLOYER", given | good | wrong)
