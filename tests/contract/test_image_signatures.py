"""Which signatures of an image count, whatever the store; and that nothing else does."""

import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument, NotFound
from services.content.attestations import attachments, envelopes, keys, signing, verification
from services.content.attestations.keys import TrustedKey
from services.content.attestations.verification import Trust, Verified
from services.content.images import (
    CONFIG,
    INDEX,
    LAYER,
    MANIFEST,
    Descriptor,
    ImageStore,
    Platform,
    canonical,
)
from services.content.images.layout import LayoutImageStore

LINUX, ARM = Platform("linux", "amd64"), Platform("linux", "arm64")
NOW = datetime(2027, 1, 1, tzinfo=UTC)
KEY, OTHER = keys.generate(), keys.generate("ed25519")
TRUSTED = Trust([TrustedKey("ours", KEY.public_key())])


@pytest.fixture
def store(image_store: ImageStore) -> ImageStore:
    return image_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a layout, whose files a test may damage."""
    return tmp_path / "damaged"


async def bytes_of(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def manifest_of(store: ImageStore, platform: Platform, text: str) -> bytes:
    layer, layer_size = await store.write(bytes_of(text.encode()))
    config = {
        "os": platform.os,
        "architecture": platform.architecture,
        "rootfs": {"type": "layers", "diff_ids": [str(layer)]},
    }
    digest, size = await store.write(bytes_of(canonical(config)))
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": Descriptor(CONFIG, digest, size).to_json(),
            "layers": [Descriptor(LAYER, layer, layer_size).to_json()],
        }
    )


async def image(store: ImageStore, reference: str, text: str) -> Descriptor:
    return await store.tag(reference, await manifest_of(store, LINUX, text), MANIFEST, LINUX)


async def verify(store: ImageStore, reference: str = "v", trust: Trust = TRUSTED, repository: str = "") -> Verified:
    return await verification.verify(store, reference, LINUX, trust, NOW, repository=repository)


async def refusal(store: ImageStore, reference: str = "v", trust: Trust = TRUSTED, repository: str = "") -> EkibenError:
    with pytest.raises(FailedPrecondition) as caught:
        await verify(store, reference, trust, repository)
    return caught.value


async def test_a_signed_image_is_verified_and_its_digest_known(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    await signing.sign(store, made, signing.by_key(KEY), name="acme/x:v")
    assert await verify(store) == Verified(made.digest, ("ours",))
    assert (await verify(store, str(made.digest))).digest == made.digest


async def test_signing_twice_attaches_once(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    first = await signing.sign(store, made, signing.by_key(KEY))
    assert (await signing.sign(store, made, signing.by_key(KEY))).digest == first.digest
    assert len(await store.referrers(made.digest)) == 1


async def test_an_image_may_be_signed_before_its_tag_names_it(store: ImageStore) -> None:
    content = await manifest_of(store, LINUX, "1")
    made = await store.keep(content, MANIFEST)
    await signing.sign(store, made, signing.by_key(KEY))
    with pytest.raises(NotFound):
        await verify(store)
    await store.tag("v", content, MANIFEST, LINUX)
    assert (await verify(store)).digest == made.digest


async def test_an_index_is_signed_for_all_of_its_manifests(store: ImageStore) -> None:
    listed = []
    for platform in (LINUX, ARM):
        kept = await store.keep(await manifest_of(store, platform, str(platform)), MANIFEST)
        listed.append(Descriptor(MANIFEST, kept.digest, kept.size_bytes, {}, platform))
    index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.to_json() for each in listed]})
    made = await store.tag("v", index, INDEX, None)
    assert (await refusal(store)).reason == "IMAGE_NOT_SIGNED"
    await signing.sign(store, made, signing.by_key(KEY))
    assert (await verify(store)).digest == listed[0].digest and (await verify(store)).named
    found = await verification.verify(store, "v", ARM, TRUSTED, NOW)
    assert found.digest == listed[1].digest
    assert (await store.resolve(str(found.digest), ARM))[0].digest == found.digest
    with pytest.raises(NotFound):
        await store.find(str((await store.resolve("v", ARM))[1].layers[0].digest))


async def test_a_signature_of_a_manifest_does_not_cover_others_of_its_index(store: ImageStore) -> None:
    listed = []
    for platform in (LINUX, ARM):
        kept = await store.keep(await manifest_of(store, platform, str(platform)), MANIFEST)
        listed.append(Descriptor(MANIFEST, kept.digest, kept.size_bytes, {}, platform))
    index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.to_json() for each in listed]})
    await store.tag("v", index, INDEX, None)
    await signing.sign(store, listed[0], signing.by_key(KEY))
    found = await verify(store)
    assert (found.digest, found.named) == (listed[0].digest, False)
    with pytest.raises(FailedPrecondition, match="no signature"):
        await verification.verify(store, "v", ARM, TRUSTED, NOW)


async def test_images_of_several_platforms_under_one_name_are_verified_each_and_signed_together(folder: Path) -> None:
    store = LayoutImageStore(folder)
    for platform in (LINUX, ARM):
        made = await store.tag("v", await manifest_of(store, platform, str(platform)), MANIFEST, platform)
        if platform == LINUX:
            await signing.sign(store, made, signing.by_key(KEY))
    assert (await verify(store)).signers == ("ours",)
    with pytest.raises(FailedPrecondition, match="no signature"):
        await verification.verify(store, "v", ARM, TRUSTED, NOW)
    named = await store.find("v")
    assert len(await verification.subjects(store, named)) == 3
    await signing.sign(store, named, signing.by_key(KEY))
    assert (await verification.verify(LayoutImageStore(folder), "v", ARM, TRUSTED, NOW)).digest == made.digest


async def test_an_unsigned_image_is_refused_and_so_is_one_that_another_signed(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    assert (await refusal(store)).reason == "IMAGE_NOT_SIGNED"
    await signing.sign(store, made, signing.by_key(OTHER))
    refused = await refusal(store)
    assert refused.reason == "IMAGE_SIGNATURE_REFUSED" and "not by a trusted key" in refused.message
    await signing.sign(store, made, signing.by_key(KEY))
    assert (await verify(store)).signers == ("ours",)


async def test_a_signature_that_was_carried_over_from_another_image_does_not_count(store: ImageStore) -> None:
    good, bad = await image(store, "good", "1"), await image(store, "v", "2")
    bundle = envelopes.seal(envelopes.statement(good.digest, envelopes.SIGNATURE, {}), KEY)
    await attachments.attach_bundle(store, bad, bundle, envelopes.SIGNATURE)
    refused = await refusal(store)
    assert refused.reason == "IMAGE_SIGNATURE_REFUSED" and "of another image" in refused.message


async def test_a_signed_bill_of_material_is_no_signature_of_the_image(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    await signing.attest(store, made, signing.by_key(KEY), envelopes.SBOM, {"bomFormat": "CycloneDX"})
    assert (await refusal(store)).reason == "IMAGE_NOT_SIGNED"
    (found,) = await verification.attested(store, made.digest, TRUSTED, NOW)
    assert (found.kind, found.signers, found.statement.predicate["bomFormat"]) == ("sbom", ("ours",), "CycloneDX")


async def test_annotations_and_types_are_not_believed(store: ImageStore) -> None:
    """Whoever may write to the registry may write them."""
    made = await image(store, "v", "1")
    bundle = envelopes.seal(envelopes.statement(made.digest, envelopes.SBOM, {}), KEY)
    await attachments.attach_bundle(store, made, bundle, envelopes.SIGNATURE)
    assert (await refusal(store)).reason == "IMAGE_NOT_SIGNED"


async def test_an_expired_key_counts_no_more(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    await signing.sign(store, made, signing.by_key(KEY))
    ours = KEY.public_key()
    refused = await refusal(store, trust=Trust([TrustedKey("ours", ours, NOW)]))
    assert refused.reason == "IMAGE_SIGNATURE_REFUSED" and "expired at 2027-01-01" in refused.message
    assert await verify(store, trust=Trust([TrustedKey("ours", ours, NOW + timedelta(seconds=1))]))


async def test_a_key_counts_for_the_repositories_it_is_trusted_for(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    await signing.sign(store, made, signing.by_key(KEY))
    bounded = Trust([TrustedKey("ours", KEY.public_key(), None, ("acme/*",))])
    assert await verify(store, trust=bounded, repository="acme/x")
    assert "trusted for acme/*, not for other/x" in (await refusal(store, trust=bounded, repository="other/x")).message


async def test_a_key_says_nothing_of_other_repositories_images_and_nothing_in_other_envelopes(
    store: ImageStore,
) -> None:
    made = await image(store, "v", "1")
    await signing.attest(store, made, signing.by_key(KEY), envelopes.SBOM, {})
    bounded = Trust([TrustedKey("ours", KEY.public_key(), None, ("acme/*",))])
    for repository, signers in (("acme/x", ("ours",)), ("other/x", ()), ("", ())):
        (found,) = await verification.attested(store, made.digest, bounded, NOW, repository=repository)
        assert found.signers == signers
    payload = envelopes.statement(made.digest, envelopes.PROVENANCE, {})
    signature = keys.sign(KEY, envelopes.pre_authentication("text/plain", payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": "text/plain",
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    bundle = canonical({"mediaType": envelopes.BUNDLE, "dsseEnvelope": envelope})
    await attachments.attach_bundle(store, made, bundle, envelopes.PROVENANCE)
    found_of = {each.kind: each for each in await verification.attested(store, made.digest, TRUSTED, NOW)}
    assert found_of["sbom"].signers == ("ours",) and found_of["provenance"].signers == ()


async def test_a_tag_that_moves_afterwards_changes_nothing_of_what_was_verified(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    await signing.sign(store, made, signing.by_key(KEY))
    verified = await verify(store)
    await image(store, "v", "2")
    assert verified.digest == made.digest
    assert (await refusal(store)).reason == "IMAGE_NOT_SIGNED"


async def test_removed_signatures_are_missed(folder: Path) -> None:
    store = LayoutImageStore(folder)
    made = await image(store, "v", "1")
    signature = await signing.sign(store, made, signing.by_key(KEY))
    (folder / "blobs" / "sha256" / signature.digest.hex).unlink()
    assert (await refusal(LayoutImageStore(folder))).reason == "IMAGE_NOT_SIGNED"


@pytest.mark.parametrize("what", ["bundle", "attachment"])
async def test_changed_signatures_do_not_count(folder: Path, what: str) -> None:
    store = LayoutImageStore(folder)
    made = await image(store, "v", "1")
    await signing.sign(store, made, signing.by_key(KEY))
    (attachment,) = await attachments.attachments(store, made.digest)
    digest = attachment.layers[0].digest if what == "bundle" else attachment.descriptor.digest
    path = folder / "blobs" / "sha256" / digest.hex
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b", 1))
    assert (await refusal(LayoutImageStore(folder))).reason in ("IMAGE_NOT_SIGNED", "IMAGE_SIGNATURE_REFUSED")


async def test_a_changed_manifest_or_configuration_is_no_longer_read(folder: Path) -> None:
    store = LayoutImageStore(folder)
    made = await image(store, "v", "1")
    await signing.sign(store, made, signing.by_key(KEY))
    content = json.loads(await attachments.read(store, made))
    for digest in (content["config"]["digest"], str(made.digest)):
        path = folder / "blobs" / "sha256" / digest.removeprefix("sha256:")
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"amd64", b"arm64").replace(b"layers", b"leyers"))
        with pytest.raises(EkibenError) as caught:
            await verify(LayoutImageStore(folder))
        assert caught.value.reason == "BLOB_DAMAGED"
        path.write_bytes(whole)


async def test_older_clients_signatures_count_too_and_are_of_one_image(store: ImageStore) -> None:
    prefix = "acme/x:" if isinstance(store, LayoutImageStore) else ""  # one layout holds several repositories
    made, other = await image(store, f"{prefix}v", "1"), await image(store, f"{prefix}other", "2")
    await signing.sign_for_older_clients(store, f"{prefix}v", made, KEY, name="acme/x")
    assert (await verify(store, f"{prefix}v")).signers == ("ours",)
    assert f"{prefix}sha256-{made.digest.hex}.sig" in await store.references()
    payload = envelopes.simple_signing(made.digest, "acme/x")
    signature = base64.b64encode(keys.sign(KEY, payload)).decode()
    layer, size = await store.write(bytes_of(payload))
    signed = Descriptor(envelopes.SIMPLE_SIGNING, layer, size, {envelopes.COSIGN_SIGNATURE: signature})
    config, config_size = await store.write(bytes_of(b"{}"))
    manifest = {
        "schemaVersion": 2,
        "config": Descriptor(CONFIG, config, config_size).to_json(),
        "layers": [signed.to_json()],
    }
    await store.tag(f"{prefix}sha256-{other.digest.hex}.sig", canonical(manifest), MANIFEST, None)
    assert "of another image" in (await refusal(store, f"{prefix}other")).message


async def test_attestations_are_listed_signed_or_not_and_whose_signature_is_known(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    await attachments.attach(store, made, envelopes.CYCLONEDX, b'{"bomFormat": "CycloneDX"}')
    await attachments.attach_statement(store, made, envelopes.PROVENANCE, {"buildDefinition": {}})
    await signing.attest(store, made, signing.by_key(OTHER), envelopes.PROVENANCE, {"buildDefinition": {}})
    await signing.sign(store, made, signing.by_key(KEY))
    await attachments.attach(store, made, "application/x-of-somebody-else", b"\x00\xff")
    found = await verification.attested(store, made.digest, TRUSTED, NOW)
    shown = sorted((each.kind, each.signed, each.signers) for each in found)
    assert shown == [
        ("provenance", False, ()),
        ("provenance", True, ()),
        ("sbom", False, ()),
        ("signature", True, ("ours",)),
    ]


async def test_an_attachment_that_is_too_large_is_not_read(store: ImageStore) -> None:
    made = await image(store, "v", "1")
    with pytest.raises(InvalidArgument) as caught:
        await attachments.read(store, Descriptor(MANIFEST, made.digest, attachments.MOST_BYTES + 1))
    assert caught.value.reason == "ATTESTATION_INVALID"
