"""Tokens with which machines pull images: those of one organization, to read them and nothing else, for a while.

An API token of a viewer reads all that the organization has, and whoever reads the Secrets of a cluster's namespace
reads what its nodes pull with. These are kept nowhere: they are sealed with a key that comes from the suite's service
token, so each builder knows what another gave, nothing must be taken back, and a new service token ends them all.
"""

import base64
import json
from datetime import UTC, datetime, timedelta

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import InvalidArgument, Unauthenticated
from services.kernel.clock import Clock
from services.kernel.identity import Principal

PREFIX = "ekp_"
USUAL = timedelta(hours=24)
LONGEST = timedelta(days=30)
_PURPOSE = b"ekiben pull tokens 1"


class PullTokens:
    """Gives them, and knows them again."""

    def __init__(self, service_token: str, clock: Clock) -> None:
        derived = HKDF(SHA256(), 32, salt=None, info=_PURPOSE).derive(service_token.encode())
        self._sealing = Fernet(base64.urlsafe_b64encode(derived))
        self._clock = clock

    def give(self, organization: str, lifetime: timedelta = USUAL) -> tuple[str, datetime]:
        """A token for the images of `organizations/{organization}`, and when it ends.

        Raises:
            InvalidArgument: it would live for no time or too long (LIFETIME_INVALID).
        """
        if not timedelta() < lifetime <= LONGEST:
            raise InvalidArgument(
                f"A token to pull with lives for at most {LONGEST.days} days, and not for {lifetime}.",
                reason="LIFETIME_INVALID",
                violations=[("lifetime", f"must be more than 0 and at most {LONGEST.days} days")],
            )
        ends = self._clock.now() + lifetime
        content = json.dumps({"organization": organization, "ends": ends.timestamp()})
        return PREFIX + self._sealing.encrypt(content.encode()).decode(), ends

    def known(self, token: str) -> Principal:
        """Who pulls with a token that begins with PREFIX.

        Raises:
            Unauthenticated: it is none of this suite's (TOKEN_INVALID), or has ended (TOKEN_EXPIRED).
        """
        try:
            content = json.loads(self._sealing.decrypt(token.removeprefix(PREFIX)))
        except InvalidToken as exc:
            raise Unauthenticated(
                "The token to pull images with is not one of this platform's.", reason="TOKEN_INVALID"
            ) from exc
        if datetime.fromtimestamp(content["ends"], UTC) <= self._clock.now():
            raise Unauthenticated("The token to pull images with has expired.", reason="TOKEN_EXPIRED")
        return Principal("services/deployer", content["organization"], Role.ROLE_VIEWER)
