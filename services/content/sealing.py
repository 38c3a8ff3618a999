"""Encryption of secrets at rest: AES-256-GCM, each value sealed to the row that holds it.

The key file has a line for each key, `<id>:<32 bytes in base64>`. The first seals; all open. `rotation.py` puts a new
one in front and seals everything anew.
"""

import base64
import binascii
import logging
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ekiben.errors import DataLoss, FailedPrecondition
from services.content.files import make_folder, write_whole

log = logging.getLogger(__name__)

_NONCE_BYTES = 12
_LINE = re.compile(r"([A-Za-z0-9_-]{1,64}):([A-Za-z0-9+/=]+)")


@dataclass(frozen=True)
class Sealed:
    """What is kept of a value."""

    key_id: str
    data: bytes


class Sealing(Protocol):
    """What seals and opens."""

    def seal(self, value: bytes, row: str) -> Sealed:
        """Encrypt; `row` names where it is kept, and it opens only there."""
        ...

    def open(self, sealed: Sealed, row: str) -> bytes:
        """Decrypt. Raises FailedPrecondition (SECRET_KEY_MISSING), DataLoss (SECRET_CORRUPT)."""
        ...


class Keys:
    """Some keys; `keys` maps ids to 32 bytes, the sealing one first."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self.current = next(iter(keys))
        """Id of the one that seals."""
        self.signing_keys = tuple(map(_signing_key, keys.values()))
        """For the URLs of the bytes endpoint: derived, so that there is one file to keep."""

    @property
    def ids(self) -> Collection[str]:
        """Which keys there are."""
        return self._keys.keys()

    def seal(self, value: bytes, row: str) -> Sealed:
        """Encrypt; `row` names where it is kept, and it opens only there."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        data = nonce + self._keys[self.current].encrypt(nonce, value, row.encode())
        return Sealed(self.current, data)

    def open(self, sealed: Sealed, row: str) -> bytes:
        """Decrypt.

        Raises:
            FailedPrecondition: its key is not in the key file (SECRET_KEY_MISSING).
            DataLoss: it was damaged, or moved from another row (SECRET_CORRUPT).
        """
        key = self._keys.get(sealed.key_id)
        if key is None:
            raise FailedPrecondition(
                f"The key {sealed.key_id!r} is not in the key file. Restore the file, or write the secret again.",
                reason="SECRET_KEY_MISSING",
                key=sealed.key_id,
            )
        try:
            return key.decrypt(sealed.data[:_NONCE_BYTES], sealed.data[_NONCE_BYTES:], row.encode())
        except InvalidTag as exc:
            raise DataLoss("The secret is damaged. Write it again.", reason="SECRET_CORRUPT") from exc


class KeyFile:
    """The keys in a file, read again whenever it was changed: a rotation needs no restart.

    A file that cannot be read meanwhile changes nothing: the keys from before stay, and the log says so.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _state(path)
        self._read = Keys(read_keys(path))

    @property
    def keys(self) -> Keys:
        """What the file holds now."""
        seen = _state(self._path)
        if seen != self._seen:
            self._seen = seen
            try:
                self._read = Keys(read_keys(self._path))
            except (FailedPrecondition, OSError) as exc:
                log.error("the key file cannot be read; the keys from before stay", extra={"error": str(exc)})
        return self._read

    def seal(self, value: bytes, row: str) -> Sealed:
        """See Keys."""
        return self.keys.seal(value, row)

    def open(self, sealed: Sealed, row: str) -> bytes:
        """See Keys."""
        return self.keys.open(sealed, row)

    def signing_keys(self) -> Sequence[bytes]:
        """Those of the keys that the file holds now."""
        return self.keys.signing_keys


def open_key_file(path: Path, *, may_make: bool) -> KeyFile:
    """The file at `path`, mode 0600; made with one key when it is absent and `may_make`.

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
        write_keys(path, [new_key()])
    return KeyFile(path)


def new_key() -> tuple[str, bytes]:
    """An id and 32 random bytes."""
    return "k" + secrets.token_hex(4), secrets.token_bytes(32)


def read_keys(path: Path) -> dict[str, bytes]:
    """The keys of the file at `path`, the sealing one first. Raises FailedPrecondition (SECRETS_KEY_INVALID)."""
    keys: dict[str, bytes] = {}
    for line in path.read_text().split("\n"):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        try:
            key = base64.b64decode(match[2], validate=True) if match else b""
        except binascii.Error:
            key = b""
        if match is None or len(key) != 32 or match[1] in keys:
            raise _unreadable(path)
        keys[match[1]] = key
    if not keys:
        raise _unreadable(path)
    return keys


def write_keys(path: Path, keys: Iterable[tuple[str, bytes]]) -> None:
    """Replace the file at `path`: after a crash it is the old one or the new one."""
    lines = [f"{key_id}:{base64.b64encode(key).decode()}\n" for key_id, key in keys]
    write_whole(path, "".join(lines).encode(), 0o600)


def _signing_key(material: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=b"ekiben signed urls").derive(material)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _unreadable(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"The key file {str(path)!r} has a line that is not '<id>:<32 bytes in base64>', an id twice, or no line.",
        reason="SECRETS_KEY_INVALID",
        path=path,
    )
