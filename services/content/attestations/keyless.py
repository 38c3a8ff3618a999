"""Signatures by identity instead of by key, through Sigstore: a certificate for minutes, a public log of signatures.

Signing asks Fulcio and Rekor and needs the network; verification needs Sigstore's trusted root, which the library
brings. The library is an extra (`pip install 'ekiben[keyless]'`), since it is large and keys do without.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ekiben.errors import FailedPrecondition, InvalidArgument, Unavailable


@dataclass(frozen=True)
class Identity:
    """Somebody whose signatures count: an email address or a workflow's URI, as an issuer knows it."""

    subject: str
    issuer: str

    @classmethod
    def parse(cls, text: str) -> "Identity":
        """From `SUBJECT@@ISSUER`. Raises InvalidArgument (IDENTITY_INVALID)."""
        subject, separator, issuer = text.partition("@@")
        if not separator or not subject or not issuer.startswith("https://"):
            raise InvalidArgument(
                f"The identity {text!r} is not of the form you@example.com@@https://accounts.example.com: a subject, "
                "@@ and its issuer.",
                reason="IDENTITY_INVALID",
            )
        return cls(subject, issuer)

    def __str__(self) -> str:
        return f"{self.subject} ({self.issuer})"


def require() -> None:
    """Raises FailedPrecondition (KEYLESS_NOT_INSTALLED) where the library is missing."""
    try:
        import sigstore  # noqa: F401
    except ImportError as exc:
        raise FailedPrecondition(
            "Signatures by identity need a library that is not installed: `pip install 'ekiben[keyless]'`.",
            reason="KEYLESS_NOT_INSTALLED",
        ) from exc


def seal(payload: bytes, token: str = "") -> bytes:
    """A statement, signed by who stands in an OpenID token (of the CI's own, or a browser's, by default).

    Raises:
        FailedPrecondition: KEYLESS_NOT_INSTALLED.
        Unavailable: Sigstore cannot be reached, or refuses (KEYLESS_UNAVAILABLE).
    """
    require()
    from sigstore.dsse import Statement
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken, Issuer, detect_credential
    from sigstore.sign import SigningContext

    try:
        trusted = ClientTrustConfig.production()
        given = token or detect_credential() or ""
        identity = IdentityToken(given) if given else Issuer(trusted.signing_config.get_oidc_url()).identity_token()
        with SigningContext.from_trust_config(trusted).signer(identity) as signer:
            return str(signer.sign_dsse(Statement(payload)).to_json()).encode()
    except Exception as exc:
        # The library has no error of its own for "cannot be reached": whatever it raises is that or a refusal.
        raise Unavailable(
            f"Sigstore gave no signature: {exc}. Signing by identity needs fulcio.sigstore.dev and rekor.sigstore.dev; "
            "sign with a key where they cannot be reached.",
            reason="KEYLESS_UNAVAILABLE",
        ) from exc


def signers(bundle: bytes, trusted: Sequence[Identity]) -> list[str]:
    """Those trusted identities that signed a bundle, by its certificate and the log's proof. Asks nobody.

    Raises:
        FailedPrecondition: identities are trusted, and the library is missing (KEYLESS_NOT_INSTALLED).
    """
    if not trusted:
        return []
    require()
    from sigstore.errors import Error
    from sigstore.models import Bundle, InvalidBundle
    from sigstore.verify import Verifier
    from sigstore.verify.policy import Identity as Policy

    found = []
    try:
        read = Bundle.from_json(bundle)
        verifier = Verifier.production(offline=True)
    except (InvalidBundle, Error, ValueError):
        return []
    for identity in trusted:
        try:
            verifier.verify_dsse(read, Policy(identity=identity.subject, issuer=identity.issuer))
        except (Error, ValueError):
            continue
        found.append(str(identity))
    return found
