"""Keys, and statements in their envelopes."""

import base64
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.content.attestations import envelopes, keyless, keys
from services.content.attestations.envelopes import SIGNATURE, pre_authentication
from services.content.attestations.keyless import Identity
from services.content.digest import Digest

DIGEST = Digest("ab" * 32)
# Made by cosign 3.1.1: `COSIGN_PASSWORD=pw cosign generate-key-pair`.
COSIGN_KEY = b"""-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----
eyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6
OCwicCI6MX0sInNhbHQiOiJoUUdXdjdqUU5VbStsUUFudCtvWjBLUGMxS2xhNWdI
RnJOdFBjYkZUQ1pjPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94
Iiwibm9uY2UiOiJQczlldWV4THBPcnlpaUh5TUJ1c0NJdFRXUHVsYjVsSSJ9LCJj
aXBoZXJ0ZXh0IjoiSFJvNjlzTFF1WS9ncHFTWHBTNzBJNHRRdUlXbkIzMUxMTzVX
NEN3eitBR1VsekFVV1pDVGwwa1R4RGhKM1hRMDhsaFNHN1BKOGVGM3lBN2prNHVE
cGFPZUhDRHVOMGpCbCs1YzIyQzdQZ2lrcE40cmpSNnJmOWZFK2l1UTJ6K29aNFF1
aDdUaUh3dFhwL29EQmMxV2M1OTUvQWV4bkNOQjlCZUNHM25zbkwvczdXWlpKRlZB
TVl3MFhUL3c4QXk0dk9DWVBrelk3czYwZFE9PSJ9
-----END ENCRYPTED SIGSTORE PRIVATE KEY-----
"""
COSIGN_PUBLIC = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEa8XDSOkGK/Mi9it/FTmM/NYBAu/u
3SkwQuhSe/ul9gfwyuOGxLh6nsNNbK8eNsizKXrPIlXL+Q11JwQAnXnCAA==
-----END PUBLIC KEY-----
"""


def reason_of(caught: pytest.ExceptionInfo[InvalidArgument]) -> str:
    return caught.value.reason


@pytest.mark.parametrize("kind", keys.KINDS)
@pytest.mark.parametrize("cosign", [False, True])
def test_a_key_is_read_back_with_its_password_only(kind: str, cosign: bool) -> None:
    key = keys.generate(kind)
    pem = keys.private_pem(key, b"secret", cosign=cosign)
    assert keys.hint_of(keys.read_private(pem, b"secret").public_key()) == keys.hint_of(key.public_key())
    for wrong in (b"", b"another"):
        with pytest.raises(InvalidArgument) as caught:
            keys.read_private(pem, wrong)
        assert reason_of(caught) == "KEY_PASSWORD_WRONG"


def test_a_plain_key_is_read_whatever_password_is_given() -> None:
    pem = keys.private_pem(keys.generate())
    assert keys.read_private(pem) and keys.read_private(pem, b"unneeded")


def test_a_key_that_cosign_made_is_read() -> None:
    (public,) = keys.read_trusted(COSIGN_PUBLIC, "cosign.pub")
    assert keys.hint_of(keys.read_private(COSIGN_KEY, b"pw").public_key()) == public.hint
    assert public.hint == "Iz0bIBs5f3Rqy8k67pirC4fJPAhhmV8UnZf8TrnpuLE="  # as cosign writes it in its bundles


def test_a_cosign_key_cannot_ask_for_more_memory_than_cosigns_own_do() -> None:
    body = json.loads(base64.b64decode("".join(COSIGN_KEY.decode().split("\n")[1:-2])))
    body["kdf"]["params"]["N"] = 1 << 30
    text = base64.b64encode(json.dumps(body).encode()).decode()
    pem = f"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n{text}\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n"
    with pytest.raises(InvalidArgument) as caught:
        keys.read_private(pem.encode(), b"pw")
    assert reason_of(caught) == "KEY_UNREADABLE"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_what_is_signed(tmp_path: Path) -> None:
    key = keys.generate()
    (tmp_path / "pub").write_bytes(keys.public_pem(key.public_key()))
    (tmp_path / "sig").write_bytes(keys.sign(key, b"data"))
    (tmp_path / "data").write_bytes(b"data")
    command = ["openssl", "dgst", "-sha256", "-verify", "pub", "-signature", "sig", "data"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("kind", keys.KINDS)
def test_signing_twice_gives_the_same_signature(kind: str) -> None:
    key = keys.generate(kind)
    assert keys.sign(key, b"data") == keys.sign(key, b"data")
    assert keys.verifies(key.public_key(), keys.sign(key, b"data"), b"data")
    assert not keys.verifies(key.public_key(), keys.sign(key, b"data"), b"date")
    assert not keys.verifies(key.public_key(), b"nonsense", b"data")


@pytest.mark.parametrize("pem", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_refused(pem: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        keys.read_private(pem)
    assert reason_of(caught) == "KEY_UNREADABLE"


def test_keys_of_other_kinds_are_refused() -> None:
    p384 = ec.generate_private_key(ec.SECP384R1())
    for key in (p384, rsa.generate_private_key(65537, 2048)):
        with pytest.raises(InvalidArgument) as caught:
            keys.read_private(keys.private_pem(key))  # type: ignore[arg-type]
        assert reason_of(caught) == "KEY_UNREADABLE"
        with pytest.raises(InvalidArgument) as caught:
            keys.read_trusted(keys.public_pem(key.public_key()).decode(), "other.pub")  # type: ignore[arg-type]
        assert reason_of(caught) == "TRUSTED_KEYS_INVALID"


def test_lines_before_a_trusted_key_bound_it() -> None:
    one, other = keys.generate(), keys.generate("ed25519")
    text = (
        "The release team's\nnot-after: 2027-01-31T00:00:00Z\nimages: acme/*, tools/scan\n"
        f"{keys.public_pem(one.public_key()).decode()}\n# ours\n{keys.public_pem(other.public_key()).decode()}"
    )
    first, second = keys.read_trusted(text, "trusted.pub")
    assert not first.expired(datetime(2027, 1, 30, tzinfo=UTC)) and first.expired(datetime(2027, 1, 31, tzinfo=UTC))
    assert first.counts_for("acme/summarizer") and first.counts_for("tools/scan")
    assert not first.counts_for("other/summarizer") and not first.counts_for("")
    assert not second.expired(datetime(2999, 1, 1, tzinfo=UTC)) and second.counts_for("other/summarizer")


def test_a_mark_of_the_encoding_hides_no_bound() -> None:
    (key,) = keys.read_trusted(f"\ufeffimages: acme/*\n{COSIGN_PUBLIC}", "trusted.pub")
    assert key.images == ("acme/*",)


@pytest.mark.parametrize("text", [f"{COSIGN_PUBLIC}images: acme/*\n", f"{COSIGN_PUBLIC}image: acme/*\n"])
def test_a_bound_behind_the_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        keys.read_trusted(text, "trusted.pub")
    assert reason_of(caught) == "TRUSTED_KEYS_INVALID"


@pytest.mark.parametrize(
    "line",
    [
        "not-after: soon",
        "images: ,",
        "image: acme/*",
        "# not_after: 2027-01-31",
        "not after: 2027-01-31",
        "\u200bimages: acme/*",
    ],
)
def test_a_bound_that_cannot_be_read_is_refused(line: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        keys.read_trusted(f"{line}\n{COSIGN_PUBLIC}", "trusted.pub")
    assert reason_of(caught) == "TRUSTED_KEYS_INVALID"


def test_a_folder_of_keys_is_read_and_a_missing_file_named(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_text(COSIGN_PUBLIC)
    (tmp_path / "notes.txt").write_text("none")
    assert [key.name.split()[0] for key in keys.load_trusted([tmp_path, tmp_path / "a.pub"])] == ["a.pub", "a.pub"]
    with pytest.raises(FailedPrecondition, match="missing"):
        keys.load_trusted([tmp_path / "missing"])
    with pytest.raises(InvalidArgument):
        keys.load_trusted([tmp_path / "notes.txt"])


def test_a_statement_is_sealed_and_read_back() -> None:
    key, another = keys.generate(), keys.generate("ed25519")
    payload = envelopes.statement(DIGEST, SIGNATURE, {}, name="acme/x:1")
    sealed = envelopes.unseal(envelopes.seal(payload, key))
    trusted = [keys.TrustedKey("one", key.public_key()), keys.TrustedKey("another", another.public_key())]
    assert [signer.name for signer in sealed.signers(trusted)] == ["one"]
    said = envelopes.read_statement(sealed.payload)
    assert said.speaks_of(DIGEST) and not said.speaks_of(Digest("cd" * 32))
    assert sealed.hint == trusted[0].hint


def test_the_encoding_that_is_signed_is_that_of_the_specification() -> None:
    # Source: DSSE protocol.md, "Test vectors".
    assert pre_authentication("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_any_change_to_what_is_sealed_shows() -> None:
    key = keys.generate()
    trusted = [keys.TrustedKey("one", key.public_key())]
    bundle = json.loads(envelopes.seal(envelopes.statement(DIGEST, SIGNATURE, {}), key))
    other = envelopes.statement(Digest("cd" * 32), SIGNATURE, {})
    for change in ({"payload": base64.b64encode(other).decode()}, {"payloadType": "text/plain"}, {"signatures": []}):
        changed = {**bundle, "dsseEnvelope": {**bundle["dsseEnvelope"], **change}}
        assert envelopes.unseal(json.dumps(changed).encode()).signers(trusted) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"dsseEnvelope": 1}',
        b'{"dsseEnvelope": {"payload": "%", "payloadType": "", "signatures": []}}',
        b'{"dsseEnvelope": {"payload": "", "payloadType": "", "signatures": 3}}',
        b'{"verificationMaterial": [1], "dsseEnvelope": {"payload": "", "payloadType": "", "signatures": []}}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        envelopes.unseal(content)
    assert reason_of(caught) == "ATTESTATION_INVALID"
    for read in (envelopes.read_statement, envelopes.read_simple_signing):
        with pytest.raises(InvalidArgument):
            read(content)


def test_identities_have_a_subject_and_an_issuer() -> None:
    assert Identity.parse("a@b.c@@https://accounts.example.com") == Identity("a@b.c", "https://accounts.example.com")
    for text in ("a@b.c", "@@https://x", "a@b.c@@accounts.example.com"):
        with pytest.raises(InvalidArgument) as caught:
            Identity.parse(text)
        assert reason_of(caught) == "IDENTITY_INVALID"


def test_identities_without_their_library_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sigstore", None)
    assert keyless.signers(b"{}", []) == []  # nobody is trusted by identity: the library is not asked for
    for call in (
        lambda: keyless.signers(b"{}", [Identity("a@b.c", "https://accounts.example.com")]),
        lambda: keyless.seal(b"{}"),
    ):
        with pytest.raises(FailedPrecondition, match=r"pip install 'ekiben\[keyless\]'") as caught:
            call()
        assert caught.value.reason == "KEYLESS_NOT_INSTALLED"
