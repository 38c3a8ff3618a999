"""The name of bytes: `sha256:<hex>`, and hashing that checks while it copies."""

import re
from dataclasses import dataclass

from ekiben.errors import InvalidArgument

_FORM = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A sha256 digest; `str()` gives `sha256:<hex>`.

    Only sha256: it is what OCI asks for, and one algorithm means that equal bytes have one name.
    """

    hex: str

    @classmethod
    def parse(cls, text: str) -> "Digest":
        """Read `sha256:<64 lower-case hex digits>`.

        Raises:
            InvalidArgument: anything else (DIGEST_INVALID).
        """
        if _FORM.fullmatch(text) is None:
            shown = text[:100]
            raise InvalidArgument(
                f"Digest {shown!r} is not 'sha256:' followed by 64 lower-case hex digits.",
                reason="DIGEST_INVALID",
                digest=shown,
            )
        return cls(text[len("sha256:") :])

    def __str__(self) -> str:
        return f"sha256:{self.hex}"
