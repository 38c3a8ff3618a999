"""What the builder says of the images that it makes: bill of material and provenance, signed where it has a key.

All of it is attached before the image's tag moves: whoever finds an image by its tag finds its signature too, and a
crash in the middle leaves attachments of a manifest that nobody names, which the next build attaches again as they are.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from services.builder.materials import Materials, materials_of, packages_of
from services.builder.provenance import provenance_of
from services.content.attestations import attachments, envelopes, keys, signing
from services.content.attestations.keys import Private
from services.content.images import Descriptor, ImageStore

OFFLINE = "https://ekiben.dev/builders/offline"
"""A person's own machine: `ekiben images build`."""


@dataclass(frozen=True)
class Part:
    """An image for one platform, and the environment that is in it."""

    image: Descriptor
    """Of its manifest, which need not be in the store yet."""
    manifest: bytes
    environment: Path
    environment_digest: str
    lock: str
    python: str
    system: Sequence[str] = ()
    """The base's packages, as package URLs."""


class Attestor:
    """Attaches what there is to say. `key` is None where nothing is signed."""

    def __init__(self, cache: Path, *, key: Private | None = None, builder: str = OFFLINE) -> None:
        """`cache` is a folder in which is remembered which packages an environment has."""
        self._packages = cache / "packages"
        self._key = key
        self._builder = builder

    async def attest(
        self, store: ImageStore, named: Descriptor, parts: Sequence[Part], name: str, say: Callable[[str], None]
    ) -> None:
        """Attach everything to an image, whose configurations are in the store.

        Args:
            named: what the tag will name: the only part's manifest, or an index of all parts.
            name: of the image, for people.
        """
        for part in parts:
            manifest = json.loads(part.manifest)
            config = json.loads(await attachments.read(store, Descriptor.from_json(manifest["config"])))
            packages = await asyncio.to_thread(
                packages_of, part.environment, part.environment_digest, part.lock, self._packages
            )
            materials = materials_of(
                part.image,
                manifest,
                config,
                packages=packages,
                system=part.system,
                environment_digest=part.environment_digest,
                lock=part.lock,
                python=part.python,
            )
            await self._attach(store, part.image, materials, name)
            count = f"{len(packages)} Python packages, {len(part.system)} of the base"
            say(f"Attached the bill of material ({count}) and the provenance.")
        if self._key is not None:
            for digest, subject in {named.digest: named, **{part.image.digest: part.image for part in parts}}.items():
                await signing.sign(store, subject, signing.by_key(self._key), name=name)
                say(f"Signed {str(digest)[:19]} with the key {keys.hint_of(self._key.public_key())[:12]}.")

    async def _attach(self, store: ImageStore, image: Descriptor, materials: Materials, name: str) -> None:
        from services.builder.bills import bill_of  # here: its library takes half a second to import

        bill = await asyncio.to_thread(bill_of, materials)
        provenance = provenance_of(materials, self._builder, version("ekiben"))
        await attachments.attach(store, image, envelopes.CYCLONEDX, bill)
        if self._key is None:
            await attachments.attach_statement(store, image, envelopes.PROVENANCE, provenance, name=name)
        else:
            seal = signing.by_key(self._key)
            await signing.attest(store, image, seal, envelopes.SBOM, json.loads(bill), name=name)
            await signing.attest(store, image, seal, envelopes.PROVENANCE, provenance, name=name)
