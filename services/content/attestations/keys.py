"""Keys for signatures of images: ECDSA on P-256 with SHA-256, or Ed25519.

Private keys are PEM: PKCS #8, plain or encrypted, or the form that cosign writes. Trusted keys are PEM files with one
or more public keys; lines `not-after: 2027-01-31T00:00:00Z` and `images: acme/*, tools/*` before a key bound it. Other
lines with a colon are refused, since a bound that is misspelled would leave the key trusted without it.
"""

import base64
import binascii
import fnmatch
import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ekiben.errors import FailedPrecondition, InvalidArgument

Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
Public = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

KINDS = ("ecdsa-p256", "ed25519")
_COSIGN = re.compile(
    r"-----BEGIN ENCRYPTED (SIGSTORE|COSIGN) PRIVATE KEY-----\s*(.*?)-----END ENCRYPTED \1 PRIVATE KEY-----", re.S
)
_PUBLIC = re.compile(r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.S)
_LARGEST_FILE = 1 << 20
_SCRYPT = {"N": 65536, "r": 8, "p": 1}
"""What cosign 2 and 3 write, and the most that is read: a file must not decide how much memory its reading takes."""


@dataclass(frozen=True)
class TrustedKey:
    """A public key whose signatures count, within its bounds."""

    name: str
    """For people: the file's name, and the fingerprint's beginning."""
    key: Public
    not_after: datetime | None = None
    """From then on nothing that it signed counts: without a trusted clock nobody knows when a signature was made."""
    images: tuple[str, ...] = ()
    """Patterns of repositories (`acme/*`) for whose images it counts; empty for all."""

    @property
    def hint(self) -> str:
        """What a Sigstore bundle says of the key it is signed with."""
        return hint_of(self.key)

    def expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.not_after is not None and now >= self.not_after

    def counts_for(self, repository: str) -> bool:
        """Whether it may sign images of a repository (`organization/name`)."""
        return not self.images or any(fnmatch.fnmatchcase(repository, pattern) for pattern in self.images)


def generate(kind: str = "ecdsa-p256") -> Private:
    """A new key. Raises InvalidArgument (KEY_KIND_UNKNOWN)."""
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "ecdsa-p256":
        return ec.generate_private_key(ec.SECP256R1())
    raise InvalidArgument(f"{kind!r} is no kind of key: take {' or '.join(KINDS)}.", reason="KEY_KIND_UNKNOWN")


def private_pem(key: Private, password: bytes = b"", *, cosign: bool = False) -> bytes:
    """A private key as PEM, encrypted where there is a password; `cosign` gives the form that cosign reads."""
    if cosign:
        return _cosign_pem(key, password)
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def public_pem(key: Public) -> bytes:
    """A public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_private(pem: bytes, password: bytes = b"", *, name: str = "The key") -> Private:
    """A private key of PEM.

    Raises:
        InvalidArgument: it is no such key (KEY_UNREADABLE), or the password is missing or wrong (KEY_PASSWORD_WRONG).
    """
    text = pem.decode("ascii", "replace")
    found: object
    if match := _COSIGN.search(text):
        found = _read_der(_cosign_der(match[2], password, name), name)
    else:
        try:
            found = serialization.load_pem_private_key(pem, password or None)
        except TypeError as exc:  # encrypted without a password, or the other way round
            if password:
                return read_private(pem, name=name)
            raise _password(
                name, "is encrypted: give its password, in the file of --password-file or of the password's setting"
            ) from exc
        except (ValueError, UnsupportedAlgorithm) as exc:
            if "ENCRYPTED" in text:
                raise _password(name, "does not open with this password") from exc
            raise _unreadable(name) from exc
    if isinstance(found, ed25519.Ed25519PrivateKey):
        return found
    if isinstance(found, ec.EllipticCurvePrivateKey) and isinstance(found.curve, ec.SECP256R1):
        return found
    raise _unreadable(name)


def load_private(path: Path, password_file: Path | None = None) -> Private:
    """The private key in a file, with the password in another. Raises FailedPrecondition (KEY_FILE_UNREADABLE), and as
    `read_private`."""
    password = _read(password_file).strip(b"\r\n") if password_file is not None else b""
    return read_private(_read(path), password, name=str(path))


def read_trusted(text: str, name: str) -> list[TrustedKey]:
    """The public keys of a PEM text, each with what the lines before it say.

    Raises:
        InvalidArgument: there is none, or one cannot be used (TRUSTED_KEYS_INVALID).
    """
    found, start = [], 0
    text = text.removeprefix("\ufeff")
    for match in _PUBLIC.finditer(text):
        before, start = text[start : match.start()], match.end()
        try:
            key = serialization.load_pem_public_key(match[0].encode())
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise _untrusted(name, f"a key in it is not readable ({exc})") from exc
        p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
        if not p256 and not isinstance(key, ed25519.Ed25519PublicKey):
            raise _untrusted(name, "a key in it is neither ECDSA on P-256 nor Ed25519")
        assert isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)
        not_after, images = _bounds(before, name)
        found.append(TrustedKey(f"{name} ({hint_of(key)[:12]})", key, not_after, images))
    if not found:
        raise _untrusted(name, "it holds no `BEGIN PUBLIC KEY`")
    if _bounds(text[start:], name) != (None, ()):
        raise _untrusted(name, "lines that bound a key stand before it, and there is no key after the last of them")
    return found


def load_trusted(paths: Sequence[Path]) -> list[TrustedKey]:
    """The trusted keys of files, or of every `*.pub` and `*.pem` in folders.

    Raises:
        FailedPrecondition: one cannot be read (KEY_FILE_UNREADABLE).
        InvalidArgument: see `read_trusted`.
    """
    found = []
    for path in paths:
        inside = sorted([*path.glob("*.pub"), *path.glob("*.pem")]) if path.is_dir() else [path]
        for file in inside:
            found += read_trusted(_read(file).decode("utf-8", "replace"), file.name)
    return found


def hint_of(key: Public) -> str:
    """Base64 of the SHA-256 of a public key's DER, as cosign names keys in bundles."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


def sign(key: Private, data: bytes) -> bytes:
    """A signature; the same for the same data where OpenSSL can (RFC 6979), so that signing twice is signing once."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    try:
        return key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    except UnsupportedAlgorithm:
        return key.sign(data, ec.ECDSA(hashes.SHA256()))


def verifies(key: Public, signature: bytes, data: bytes) -> bool:
    """Whether a signature of data is this key's."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _bounds(text: str, name: str) -> tuple[datetime | None, tuple[str, ...]]:
    not_after: datetime | None = None
    images: tuple[str, ...] = ()
    for line in text.splitlines():
        word, colon, value = line.strip("# \t").partition(":")
        word = word.strip().lower()
        if word == "not-after":
            try:
                not_after = datetime.fromisoformat(value.strip())
            except ValueError as exc:
                raise _untrusted(name, f"not-after is {value.strip()!r}, not like 2027-01-31T00:00:00Z") from exc
            not_after = not_after if not_after.tzinfo else not_after.replace(tzinfo=UTC)
        elif word == "images":
            images = tuple(part.strip() for part in value.split(",") if part.strip())
            if not images:
                raise _untrusted(name, "images: names no repository, as `acme/*` does")
        elif colon:
            raise _untrusted(
                name,
                f"{word[:40]!r} bounds no key, as `not-after:` and `images:` do; write other lines without a colon",
            )
    return not_after, images


def _cosign_pem(key: Private, password: bytes) -> bytes:
    from nacl.secret import SecretBox

    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    salt = secrets.token_bytes(32)
    kdf = Scrypt(salt=salt, length=32, n=_SCRYPT["N"], r=_SCRYPT["r"], p=_SCRYPT["p"])
    made = SecretBox(kdf.derive(password)).encrypt(der)
    content = {
        "kdf": {"name": "scrypt", "params": _SCRYPT, "salt": _b64(salt)},
        "cipher": {"name": "nacl/secretbox", "nonce": _b64(made.nonce)},
        "ciphertext": _b64(made.ciphertext),
    }
    body = _b64(json.dumps(content).encode())
    lines = [body[at : at + 64] for at in range(0, len(body), 64)]
    kind = "ENCRYPTED SIGSTORE PRIVATE KEY"
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""]).encode()


def _cosign_der(body: str, password: bytes, name: str) -> bytes:
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox

    try:
        content = json.loads(base64.b64decode(body))
        params = {key: int(content["kdf"]["params"][key]) for key in ("N", "r", "p")}
        salt, nonce = base64.b64decode(content["kdf"]["salt"]), base64.b64decode(content["cipher"]["nonce"])
        ciphertext = base64.b64decode(content["ciphertext"])
        if any(params[key] > most for key, most in _SCRYPT.items()):
            raise ValueError("scrypt with larger parameters than cosign's")
        kdf = Scrypt(salt=salt, length=32, n=params["N"], r=params["r"], p=params["p"])
        return bytes(SecretBox(kdf.derive(password)).decrypt(ciphertext, nonce))
    except CryptoError as exc:
        raise _password(name, "does not open with this password") from exc
    except (ValueError, KeyError, TypeError, binascii.Error) as exc:
        raise _unreadable(name) from exc


def _read_der(der: bytes, name: str) -> object:
    try:
        return serialization.load_der_private_key(der, None)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _unreadable(name) from exc


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_FILE)
    except OSError as exc:
        raise FailedPrecondition(
            f"The key file {path} cannot be read: {exc.strerror}. Name one that this user may read.",
            reason="KEY_FILE_UNREADABLE",
            file=path,
        ) from exc


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _password(name: str, how: str) -> InvalidArgument:
    return InvalidArgument(f"{name} {how}.", reason="KEY_PASSWORD_WRONG")


def _unreadable(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} is no private key that can sign images: it must be PEM of ECDSA on P-256 or Ed25519, or cosign's "
        "own form. `ekiben images keygen` makes one.",
        reason="KEY_UNREADABLE",
    )


def _untrusted(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"The trusted keys of {name} cannot be used: {why}.", reason="TRUSTED_KEYS_INVALID", file=name
    )
