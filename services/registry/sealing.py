"""Encryption of secrets at rest: AES-256-GCM, each value sealed to the row that holds it.

The key file has a line for each key, `<id>:<32 bytes in base64>`. The first seals; all open. To rotate, put a new
line in front and update each secret; then the old line can go.
"""

import base64
import binascii
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ekiben.errors import DataLoss, FailedPrecondition
from services.content.files import make_folder, write_whole

_NONCE_BYTES = 12
_LINE = re.compile(r"([A-Za-z0-9_-]{1,64}):([A-Za-z0-9+/=]+)")


@dataclass(frozen=True)
class Sealed:
    """What is kept of a value."""

    key_id: str
    data: bytes


class Keys:
    """The keys of one registry; `keys` maps ids to 32 bytes, the sealing one first."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        self._keys = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._current, material = next(iter(keys.items()))
        self.signing_key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"ekiben signed urls").derive(material)
        """For the URLs of the bytes endpoint: derived, so that there is one key to keep."""

    def seal(self, value: bytes, row: str) -> Sealed:
        """Encrypt; `row` names where it is kept, and it opens only there."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        data = nonce + self._keys[self._current].encrypt(nonce, value, row.encode())
        return Sealed(self._current, data)

    def open(self, sealed: Sealed, row: str) -> bytes:
        """Decrypt.

        Raises:
            FailedPrecondition: its key is not in the key file (SECRET_KEY_MISSING).
            DataLoss: it was damaged, or moved from another row (SECRET_CORRUPT).
        """
        key = self._keys.get(sealed.key_id)
        if key is None:
            raise FailedPrecondition(
                f"The key {sealed.key_id!r} is not in the registry's key file. Restore the file, or write the "
                "secret again.",
                reason="SECRET_KEY_MISSING",
                key=sealed.key_id,
            )
        try:
            return key.decrypt(sealed.data[:_NONCE_BYTES], sealed.data[_NONCE_BYTES:], row.encode())
        except InvalidTag as exc:
            raise DataLoss("The secret is damaged. Write it again.", reason="SECRET_CORRUPT") from exc


def load_keys(path: Path, *, may_make: bool) -> Keys:
    """The keys in the file at `path`, mode 0600; made when it is absent and `may_make`.

    Raises:
        FailedPrecondition: absent though secrets are sealed with it, or unreadable (SECRETS_KEY_INVALID).
    """
    if not path.exists():
        if not may_make:
            raise FailedPrecondition(
                f"The key file {str(path)!r} is missing, and there are secrets sealed with it. Restore it.",
                reason="SECRETS_KEY_INVALID",
                path=path,
            )
        make_folder(path.parent)
        key_id = "k" + secrets.token_hex(4)
        write_whole(path, f"{key_id}:{base64.b64encode(secrets.token_bytes(32)).decode()}\n".encode(), 0o600)
    keys: dict[str, bytes] = {}
    for line in path.read_text().split("\n"):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        try:
            key = base64.b64decode(match[2], validate=True) if match else b""
        except binascii.Error:
            key = b""
        if match is None or len(key) != 32:
            raise _unreadable(path)
        keys[match[1]] = key
    if not keys:
        raise _unreadable(path)
    return Keys(keys)


def _unreadable(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"The key file {str(path)!r} has a line that is not '<id>:<32 bytes in base64>', or none.",
        reason="SECRETS_KEY_INVALID",
        path=path,
    )
