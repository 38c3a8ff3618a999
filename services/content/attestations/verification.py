"""Which trusted key signed an image: the one place that decides whether a signature counts.

What is run is what was verified: a reference is resolved once, to a digest, and everything after speaks of the digest.
A signature of an index covers the manifests in it, since the index names them by digest.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ekiben.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from services.content.attestations import attachments, envelopes, keyless
from services.content.attestations.envelopes import BUNDLE, COSIGN_SIGNATURE, KINDS, SIGNATURE, Statement
from services.content.attestations.keyless import Identity
from services.content.attestations.keys import TrustedKey, verifies
from services.content.digest import Digest
from services.content.images import INDEX, Descriptor, ImageStore, Platform
from services.content.images.resolving import object_of

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
_BUILDKIT = "vnd.docker.reference.type"
"""Of entries of an index that are no images but BuildKit's attestations."""


@dataclass(frozen=True)
class Trust:
    """Whose signatures count."""

    keys: Sequence[TrustedKey] = ()
    identities: Sequence[Identity] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.identities)


@dataclass(frozen=True)
class Verified:
    """An image that somebody who is trusted has signed."""

    digest: Digest
    """Of what is run; a signature of a manifest may be of the index that names it."""
    signers: tuple[str, ...]
    named: bool = True
    """Whether what the reference names is signed; else, of an index, what is run only."""


@dataclass(frozen=True)
class Attested:
    """A statement about an image, and who is known to have signed it."""

    kind: str
    """`signature`, `sbom`, `provenance`, or a predicate's type."""
    statement: Statement
    digest: Digest
    """Of the attachment."""
    size_bytes: int
    signers: tuple[str, ...] = ()
    """Trusted ones; without any it may be anybody's."""
    signed: bool = True
    """Whether there is any signature at all."""


@dataclass
class _Refusals:
    """Why signatures did not count, each once."""

    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


async def verify(
    store: ImageStore,
    reference: str,
    platform: Platform | None,
    trust: Trust,
    now: datetime,
    *,
    repository: str = "",
    digest: str = "",
) -> Verified:
    """The digest of the image that a reference names for a platform, once a trusted signature of it is found.

    Args:
        platform: none where an engine is given the digest and chooses by itself: of an index, the signature must be of
            the index, since engines choose by other rules than `resolve`, and for machines other than this one.
        repository: `organization/name` of the image, for keys that count for some repositories only.
        digest: of what is meant, whatever the reference names by now.

    Raises:
        NotFound: there is no such image (IMAGE_NOT_FOUND).
        FailedPrecondition: nobody signed it (IMAGE_NOT_SIGNED), or nobody whose signature counts
            (IMAGE_SIGNATURE_REFUSED); the message says why not.
    """
    named = await store.find(digest or reference)
    digest = str(named.digest)
    run = named.digest if platform is None else (await store.resolve(digest, platform))[0].digest
    refusals = _Refusals()
    signers: dict[Digest, list[str]] = {}
    for subject in dict.fromkeys((named.digest, run)):
        signers[subject] = await _bundled(store, subject, trust, now, repository, refusals)
        signers[subject] += await _simple(store, reference, subject, trust, now, repository, refusals)
    if any(signers.values()):
        everybody = [each for found in signers.values() for each in found]
        return Verified(run, tuple(dict.fromkeys(everybody)), bool(signers[named.digest]))
    shown = reference if reference == digest else f"{reference or 'The image'} ({digest})"
    if not refusals.reasons:
        raise FailedPrecondition(
            f"{shown} has no signature. Sign it with `ekiben images sign`, or have the builder sign what it builds.",
            reason="IMAGE_NOT_SIGNED",
            image=reference,
            digest=digest,
        )
    raise FailedPrecondition(
        f"{shown} has no signature that counts: {'; '.join(refusals.reasons)}. Sign it with a trusted key, or trust "
        "the one that signed it.",
        reason="IMAGE_SIGNATURE_REFUSED",
        image=reference,
        digest=digest,
    )


async def subjects(store: ImageStore, named: Descriptor) -> list[Descriptor]:
    """What is signed of an image: what its reference names and, of an index, each manifest that it lists."""
    if named.media_type not in (INDEX, DOCKER_LIST):
        return [named]
    content = await attachments.read(store, named, attachments.MOST_MANIFEST_BYTES)
    inner = [Descriptor.from_json(each) for each in object_of(content, str(named.digest)).get("manifests") or ()]
    return [named, *(each for each in inner if each.annotations.get(_BUILDKIT) is None)]


def repository_of(image: str) -> str:
    """The repository in an image's name: `acme/x` of `docker://host/acme/x:1` and of `oci:folder:acme/x:1`; empty where
    a layout has no repositories."""
    transport, _, rest = image.partition(":")
    if transport == "docker":
        path = rest.removeprefix("//").partition("/")[2].partition("@")[0]
        return path.rpartition(":")[0] if ":" in path else path
    reference = rest.partition(":")[2].partition("@")[0]
    return reference.rpartition(":")[0]


async def attested(
    store: ImageStore, subject: Digest, trust: Trust, now: datetime, *, repository: str = ""
) -> list[Attested]:
    """Statements about a manifest, signed or not. Whether one counts is said by its `signers`, as `verify` says it."""
    found = []
    for attachment in await attachments.attachments(store, subject):
        for layer in attachment.layers:
            try:
                one = await _statement(store, layer, trust, now, subject, repository)
            except (NotFound, DataLoss, InvalidArgument):
                continue  # damaged, gone, or something else than a statement
            if one is not None and one.statement.speaks_of(subject):
                found.append(one)
    return found


async def _statement(
    store: ImageStore, layer: Descriptor, trust: Trust, now: datetime, subject: Digest, repository: str
) -> Attested | None:
    if layer.media_type == BUNDLE:
        content = await attachments.read(store, layer)
        sealed = envelopes.unseal(content)
        said = envelopes.read_statement(sealed.payload)
        signers: list[str] = []
        if sealed.payload_type == envelopes.IN_TOTO:
            signers += _counting(sealed.signers(trust.keys), now, repository, _Refusals())
            signers += keyless.signers(content, trust.identities) if sealed.keyless else []
        kind = KINDS.get(said.predicate_type, said.predicate_type)
        return Attested(kind, said, layer.digest, layer.size_bytes, tuple(signers))
    if layer.media_type == envelopes.IN_TOTO:
        said = envelopes.read_statement(await attachments.read(store, layer))
        kind = KINDS.get(said.predicate_type, said.predicate_type)
        return Attested(kind, said, layer.digest, layer.size_bytes, signed=False)
    if layer.media_type == envelopes.CYCLONEDX:
        content = await attachments.read(store, layer)
        try:
            predicate = json.loads(content)
        except (ValueError, RecursionError):
            return None
        said = Statement((str(subject),), envelopes.SBOM, predicate)
        return Attested("sbom", said, layer.digest, layer.size_bytes, signed=False)
    return None


async def _bundled(
    store: ImageStore, subject: Digest, trust: Trust, now: datetime, repository: str, refusals: _Refusals
) -> list[str]:
    signers = []
    for attachment in await attachments.attachments(store, subject):
        for layer in attachment.layers:
            if layer.media_type != BUNDLE:
                continue
            try:
                content = await attachments.read(store, layer)
                sealed = envelopes.unseal(content)
                said = envelopes.read_statement(sealed.payload)
            except (NotFound, DataLoss, InvalidArgument):
                refusals.add("one is damaged")
                continue
            if said.predicate_type != SIGNATURE:
                continue  # says something else about the image than that it may be used
            known = sealed.signers(trust.keys)
            identities = keyless.signers(content, trust.identities) if sealed.keyless else []
            if not known and not identities:
                refusals.add(_unknown(sealed.hint, keyless_=sealed.keyless, payload_type=sealed.payload_type))
            elif sealed.payload_type != envelopes.IN_TOTO or not said.speaks_of(subject):
                refusals.add("one is of another image")
            else:
                signers += identities + _counting(known, now, repository, refusals)
    return signers


async def _simple(
    store: ImageStore,
    reference: str,
    subject: Digest,
    trust: Trust,
    now: datetime,
    repository: str,
    refusals: _Refusals,
) -> list[str]:
    signers = []
    for layer in await attachments.simple_signatures(store, reference, subject):
        try:
            payload = await attachments.read(store, layer)
            signature = base64.b64decode(layer.annotations.get(COSIGN_SIGNATURE, ""), validate=True)
            of = envelopes.read_simple_signing(payload)
        except (NotFound, DataLoss, InvalidArgument, binascii.Error):
            refusals.add("one is damaged")
            continue
        known = [key for key in trust.keys if verifies(key.key, signature, payload)]
        if not known:
            refusals.add(_unknown("", keyless_=False, payload_type=envelopes.IN_TOTO))
        elif of != str(subject):
            refusals.add("one is of another image")
        else:
            signers += _counting(known, now, repository, refusals)
    return signers


def _counting(known: Sequence[TrustedKey], now: datetime, repository: str, refusals: _Refusals) -> list[str]:
    signers = []
    for key in known:
        if key.expired(now):
            refusals.add(f"the key {key.name} expired at {key.not_after:%Y-%m-%d %H:%M} UTC")
        elif not key.counts_for(repository):
            refusals.add(f"the key {key.name} is trusted for {', '.join(key.images)}, not for {repository or 'this'}")
        else:
            signers.append(key.name)
    return signers


def _unknown(hint: str, *, keyless_: bool, payload_type: str) -> str:
    if payload_type != envelopes.IN_TOTO:
        return "one is no in-toto statement"
    if keyless_:
        return "one is by an identity that is not trusted"
    return f"one is not by a trusted key{f' (it names {hint[:12]})' if hint else ''}"
