"""`python3 image.py OUT.tar NAME ENTRYPOINT FILE=DESTINATION…`: an OCI archive with one layer of static programs.

Standard library only. ENTRYPOINT is JSON, as `["/pause"]`.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path


def archive(files: dict[str, tuple[bytes, int]]) -> bytes:
    """A tar of names to contents and modes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def main(out: str, name: str, entrypoint: str, *files: str) -> None:
    """Write it."""
    blobs: dict[str, tuple[bytes, int]] = {}

    def described(content: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = (content, 0o644)
        kind = f"application/vnd.oci.image.{media_type}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    pairs = (each.split("=", 1) for each in files)
    layer = archive({target: (Path(source).read_bytes(), 0o755) for source, target in pairs})
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": json.loads(entrypoint)},
        "rootfs": rootfs,
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described(json.dumps(config).encode(), "config.v1+json"),
        "layers": [described(layer, "layer.v1.tar")],
    }
    named = described(json.dumps(manifest).encode(), "manifest.v1+json")
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = json.dumps({"schemaVersion": 2, "manifests": [{**named, "annotations": names}]}).encode()
    layout = {"oci-layout": (b'{"imageLayoutVersion":"1.0.0"}', 0o644), "index.json": (index, 0o644)}
    Path(out).write_bytes(archive({**layout, **blobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
