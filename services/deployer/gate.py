"""Whether an image may be run, by who signed it.

What is asked for is a digest, and it is the digest that runtimes are given: a tag that moves between the look and the
start changes nothing. Of an index the signature must be of the index itself: which manifest of it is run is for the
engine to choose, on the machine where it runs. Keys are read anew for each look, so that one is trusted or distrusted
without a restart.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import Counter

from ekiben.errors import EkibenError, FailedPrecondition, Unavailable
from services.content import open_images
from services.content.attestations import keys, verification
from services.content.attestations.keyless import Identity
from services.content.attestations.verification import Trust
from services.content.images.resolving import read_json
from services.deployer.domain import Condition
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

TYPE = "Verified"
"""Of the condition that says whose signature an image has."""
REFUSED = ("IMAGE_NOT_SIGNED", "IMAGE_SIGNATURE_REFUSED", "KEY_FILE_UNREADABLE", "TRUSTED_KEYS_INVALID")
"""Reasons of errors that say: this image may not be run."""

_looks = Counter("ekiben_image_verifications_total", "Images looked at for signatures, by how it ended.", ["outcome"])


class Gate:
    """See the module. `policy` is `off`, `warn` or `enforce`."""

    def __init__(self, policy: str, trusted: Sequence[Path], identities: Sequence[str], clock: Clock) -> None:
        self._policy, self._keys, self._clock = policy, trusted, clock
        self._identities = [Identity.parse(each) for each in identities]

    @property
    def enforces(self) -> bool:
        """Whether an image whose signature does not count is refused."""
        return self._policy == "enforce"

    async def look(self, image: str, digest: str, mounted: Sequence[str] = ()) -> Condition | None:
        """What is to be said of an image that is to be run: whose signature counts, or why none does.

        None where the policy is `off`. Where it is `enforce`, an image whose signature does not count is refused.

        Args:
            image: where it lies, as `open_images` reads it.
            digest: of what is run: a manifest, or an index.
            mounted: digests of images that are mounted into it: what is signed must be an index that lists them.

        Raises:
            FailedPrecondition: refused (IMAGE_NOT_SIGNED, IMAGE_SIGNATURE_REFUSED), or trusted keys cannot be read.
            EkibenError: with `enforce`, it cannot be looked at; reasons are those of its store.
        """
        if self._policy == "off":
            return None
        try:
            signers = await self._signers(image, digest, mounted)
        except EkibenError as exc:
            return self._problem(digest, exc)
        except Exception as exc:  # a folder that may not be read, say: with `warn` nothing keeps an image from running
            log.exception("an image cannot be looked at", extra={"digest": digest})
            return self._problem(
                digest,
                Unavailable(
                    f"Whether {digest} is signed cannot be seen at {image}: {exc!r}. See whether the deployer can read "
                    "it there.",
                    reason="IMAGE_NOT_LOOKED_AT",
                ),
            )
        _looks.labels("verified").inc()
        return Condition(TYPE, True, "SIGNED", f"{digest} is signed by {', '.join(signers)}.")

    def look_at_environment(self, bento: str) -> Condition | None:
        """The same of an environment on the deployer's machine, which nobody can sign.

        Raises:
            FailedPrecondition: refused (IMAGE_NOT_SIGNED).
        """
        if self._policy == "off":
            return None
        problem = FailedPrecondition(
            f"{bento} would run in an environment on the deployer's machine, which nobody can sign. Deploy it to a "
            "cluster that was added (`ekiben clusters list`), or have an operator set EKIBEN_DEPLOYER_RUNTIME to "
            "podman or kubernetes.",
            reason="IMAGE_NOT_SIGNED",
            bento=bento,
        )
        return self._problem(bento, problem)

    def _problem(self, digest: str, problem: EkibenError) -> Condition:
        unknown = isinstance(problem, Unavailable)
        _looks.labels("unknown" if unknown else "refused").inc()
        log.warning("an image's signature does not count", extra={"digest": digest, "reason": problem.reason})
        if self._policy == "enforce":
            raise problem
        text = f"{problem.message} It runs nevertheless, since the policy for images is warn."
        return Condition(TYPE, None if unknown else False, problem.reason, text)

    async def _signers(self, image: str, digest: str, mounted: Sequence[str]) -> Sequence[str]:
        trust = Trust(keys.load_trusted(self._keys), self._identities)
        # A prefix that all images of the platform have in their registry is not part of what keys are trusted for.
        repository = "/".join(verification.repository_of(image).split("/")[-2:])
        async with open_images(image) as (store, reference):
            found = await verification.verify(
                store, reference, None, trust, self._clock.now(), repository=repository, digest=digest
            )
            if mounted:
                listed = (await read_json(store, await store.find(digest))).get("manifests") or ()
                if strange := set(mounted) - {str(each.get("digest")) for each in listed}:
                    raise FailedPrecondition(
                        f"{digest} is signed, but {', '.join(sorted(strange))}, which is mounted into it, is not in "
                        "its index. Build the image again.",
                        reason="IMAGE_SIGNATURE_REFUSED",
                        image=image,
                        digest=digest,
                    )
        return found.signers


def worst(conditions: Sequence[Condition]) -> Condition | None:
    """Of several targets' conditions the one to show: what is wrong before what is not known, and that before good."""
    order = {False: 0, None: 1, True: 2}
    return min(conditions, key=lambda condition: order[condition.status], default=None)
