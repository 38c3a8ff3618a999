"""One image of a layout, in a layout of its own from which podman pulls it.

Names in the builder's layout may be moved, its index rewritten and its files exchanged at any time. So the manifest is
there as it was when its digest was checked, which podman does not do for what an `index.json` names; what the manifest
names are links, and podman checks what they lead to.
"""

import hashlib
import json
import re
from pathlib import Path

from ekiben.errors import FailedPrecondition

_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_DIGEST = re.compile(rb"sha256:([0-9a-f]{64})")
_MOST_MANIFEST_BYTES = 4 << 20


def show(layout: Path, digest: str, view: Path) -> None:
    """Make the layout `view` with one image of another, of a manifest or an index.

    Raises:
        FailedPrecondition: it is not there, or damaged (IMAGE_MISSING).
    """
    blobs = (layout / "blobs" / "sha256").resolve()
    name = digest.removeprefix("sha256:")
    try:
        content = (blobs / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != name:
            raise FailedPrecondition(f"The manifest of image {digest} is damaged in {layout}.", reason="IMAGE_MISSING")
        media_type = json.loads(content).get("mediaType")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise FailedPrecondition(f"The image {digest} is not in {layout}.", reason="IMAGE_MISSING") from None
    described = {
        "mediaType": media_type or (_INDEX if b'"manifests"' in content else _MANIFEST),
        "digest": digest,
        "size": len(content),
        "annotations": {"org.opencontainers.image.ref.name": "image"},
    }
    shown = view / "blobs" / "sha256"
    shown.mkdir(parents=True, mode=0o700)
    (view / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (view / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (shown / name).write_bytes(content)
    linked, waiting = {name}, [content]
    while waiting:
        naming = waiting.pop()
        for each in {found.decode() for found in _DIGEST.findall(naming)} - linked:
            linked.add(each)
            (shown / each).symlink_to(blobs / each)
            if b'"manifests"' in naming and (blobs / each).is_file():
                with (blobs / each).open("rb") as file:
                    waiting.append(file.read(_MOST_MANIFEST_BYTES))
