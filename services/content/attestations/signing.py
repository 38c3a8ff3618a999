"""Signing an image: by a key, or by an identity."""

import base64
from collections.abc import Callable, Mapping

from services.content.attestations import attachments, envelopes, keyless, keys
from services.content.attestations.envelopes import SIGNATURE
from services.content.attestations.keys import Private
from services.content.images import Descriptor, ImageStore

Seal = Callable[[bytes], bytes]
"""From a statement to its bundle."""


def by_key(key: Private) -> Seal:
    """Seal with a key."""
    return lambda payload: envelopes.seal(payload, key)


def by_identity(token: str = "") -> Seal:
    """Seal by an identity; see `keyless.seal` for what it raises."""
    return lambda payload: keyless.seal(payload, token)


async def sign(store: ImageStore, subject: Descriptor, seal: Seal, *, name: str = "") -> Descriptor:
    """Sign the manifest or the index that `subject` names. With a key, twice is once.

    Args:
        name: what the image is called, for people who read the signature.
    """
    return await attest(store, subject, seal, SIGNATURE, {}, name=name)


async def attest(
    store: ImageStore,
    subject: Descriptor,
    seal: Seal,
    predicate_type: str,
    predicate: Mapping[str, object],
    *,
    name: str = "",
) -> Descriptor:
    """Attach a signed statement about a manifest."""
    payload = envelopes.statement(subject.digest, predicate_type, predicate, name=name)
    return await attachments.attach_bundle(store, subject, seal(payload), predicate_type)


async def sign_for_older_clients(
    store: ImageStore, reference: str, subject: Descriptor, key: Private, *, name: str = ""
) -> Descriptor:
    """Sign in the tag `sha256-….sig` too, for clients that read no referrers."""
    payload = envelopes.simple_signing(subject.digest, name)
    signature = base64.b64encode(keys.sign(key, payload)).decode()
    return await attachments.attach_simple_signing(store, reference, subject.digest, name, signature)
