"""Statements about images, and the envelopes they are signed in. Pure.

Sources: in-toto Attestation Framework v1 (Statement), DSSE v1 (signature over the pre-authentication encoding),
Sigstore bundle v0.3 (media type and members), and cosign's SIGNATURE_SPEC (simple signing).
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekiben.errors import InvalidArgument
from services.content.attestations.keys import Private, TrustedKey, hint_of, sign, verifies
from services.content.digest import Digest
from services.content.images import canonical

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
CYCLONEDX = "application/vnd.cyclonedx+json"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
COSIGN_SIGNATURE = "dev.cosignproject.cosign/signature"

SIGNATURE = "https://sigstore.dev/cosign/sign/v1"
"""Predicate of a statement that says no more than: this is signed."""
PROVENANCE = "https://slsa.dev/provenance/v1"
SBOM = "https://cyclonedx.org/bom"
KINDS = {SIGNATURE: "signature", PROVENANCE: "provenance", SBOM: "sbom"}

_STATEMENT = "https://in-toto.io/Statement/v1"
_OLD_STATEMENT = "https://in-toto.io/Statement/v0.1"
_SIMPLE_TYPES = ("cosign container image signature", SIGNATURE)


@dataclass(frozen=True)
class Statement:
    """What somebody says of manifests, by digest."""

    subjects: tuple[str, ...]
    """Digests, `sha256:<hex>`."""
    predicate_type: str
    predicate: Mapping[str, Any]

    def speaks_of(self, digest: Digest) -> bool:
        """Whether a manifest is among its subjects."""
        return str(digest) in self.subjects


def statement(subject: Digest, predicate_type: str, predicate: Mapping[str, Any], *, name: str = "") -> bytes:
    """The bytes of a statement about one manifest; equal ones for equal content."""
    subject_ = {**({"name": name} if name else {}), "digest": {"sha256": subject.hex}}
    content = {"_type": _STATEMENT, "subject": [subject_], "predicateType": predicate_type, "predicate": predicate}
    return canonical(content)


def read_statement(payload: bytes) -> Statement:
    """Read one. Raises InvalidArgument (ATTESTATION_INVALID)."""
    content = _object(payload)
    try:
        if content["_type"] not in (_STATEMENT, _OLD_STATEMENT):
            raise ValueError(f"its type is {content['_type']!r}")
        subjects = tuple(f"sha256:{each['digest']['sha256']}" for each in content["subject"])
        predicate = content.get("predicate") or {}
        if not isinstance(predicate, dict):
            raise ValueError("its predicate is not an object")
        return Statement(subjects, str(content["predicateType"]), predicate)
    except (KeyError, TypeError, ValueError) as exc:
        raise _invalid(f"it is no in-toto statement ({exc})") from exc


def seal(payload: bytes, key: Private) -> bytes:
    """A statement, signed, as a Sigstore bundle."""
    envelope = {
        "payload": _b64(payload),
        "payloadType": IN_TOTO,
        "signatures": [{"sig": _b64(sign(key, pre_authentication(IN_TOTO, payload)))}],
    }
    material = {"publicKey": {"hint": hint_of(key.public_key())}}
    return canonical({"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope})


@dataclass(frozen=True)
class Sealed:
    """A bundle, read and not yet believed."""

    payload: bytes
    payload_type: str
    signatures: tuple[bytes, ...]
    hint: str
    keyless: bool
    """Whether it names a certificate instead of a key."""

    def signers(self, trusted: Sequence[TrustedKey]) -> list[TrustedKey]:
        """Those trusted keys that signed it."""
        data = pre_authentication(self.payload_type, self.payload)
        return [key for key in trusted if any(verifies(key.key, signature, data) for signature in self.signatures)]


def unseal(content: bytes) -> Sealed:
    """Read a bundle. Raises InvalidArgument (ATTESTATION_INVALID)."""
    bundle = _object(content)
    try:
        envelope, material = bundle["dsseEnvelope"], bundle.get("verificationMaterial") or {}
        return Sealed(
            base64.b64decode(envelope["payload"], validate=True),
            str(envelope["payloadType"]),
            tuple(base64.b64decode(each["sig"], validate=True) for each in envelope["signatures"]),
            str((material.get("publicKey") or {}).get("hint") or ""),
            bool(material.get("certificate") or material.get("x509CertificateChain")),
        )
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error) as exc:
        raise _invalid(f"it is no Sigstore bundle with a DSSE envelope ({exc!r})") from exc


def pre_authentication(kind: str, payload: bytes) -> bytes:
    """What is signed of an envelope: its type and its payload, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def simple_signing(subject: Digest, reference: str) -> bytes:
    """What cosign signs for clients that read the tag `sha256-….sig`."""
    identity = {"docker-reference": reference}
    image = {"docker-manifest-digest": str(subject)}
    critical = {"identity": identity, "image": image, "type": _SIMPLE_TYPES[0]}
    return canonical({"critical": critical, "optional": None})


def read_simple_signing(payload: bytes) -> str:
    """The digest that such a payload names. Raises InvalidArgument (ATTESTATION_INVALID)."""
    try:
        critical = _object(payload)["critical"]
        if critical["type"] not in _SIMPLE_TYPES:
            raise ValueError(f"its type is {critical['type']!r}")
        return str(critical["image"]["docker-manifest-digest"])
    except (KeyError, TypeError, ValueError) as exc:
        raise _invalid(f"it is no signature payload of cosign ({exc})") from exc


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _invalid("it is not JSON") from exc
    if not isinstance(found, dict):
        raise _invalid("it is not an object")
    return found


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _invalid(why: str) -> InvalidArgument:
    return InvalidArgument(f"An attestation cannot be read: {why}.", reason="ATTESTATION_INVALID")
