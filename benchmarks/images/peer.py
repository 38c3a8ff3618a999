"""The peer: `bentoml containerize`, whose Dockerfile buildah runs, and `buildah push`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from services.builder.compression import Method, Packed
from services.builder.layers import Entry
from services.builder.offline import here
from services.content.images import CONFIG, MANIFEST, Descriptor, canonical
from services.content.images.layout import LayoutImageStore
from tests.base_image import base_image
from tests.platform import BentoMl

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def base(folder: Path) -> str:
    """`oci:FOLDER:REFERENCE` of the base of both: that of the tests, with uv, which BentoML's Dockerfile asks for, and
    this machine's certificates."""
    layout = folder / "base"
    subprocess.run(["cp", "-a", base_image().removeprefix("oci:"), layout], check=True)
    entries = [Entry("usr/local/bin/uv", path=Path(sys.executable).parent / "uv", executable=True)]
    entries += [Entry(str(CERTIFICATES).lstrip("/"), path=CERTIFICATES)] if CERTIFICATES.exists() else []

    async def given(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def make() -> None:
        store, packed = LayoutImageStore(layout), Packed(entries, Method.GZIP)
        _, below = await store.resolve("bookworm", here())
        digest, size_bytes = await store.write(given(packed))
        config = dict(below.config)
        config["config"] = {**config["config"], "Env": [*config["config"]["Env"], f"SSL_CERT_FILE={CERTIFICATES}"]}
        diff_ids = [*config["rootfs"]["diff_ids"], str(packed.diff_id(digest))]
        config["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
        config["history"] = [{"created_by": "base"}] * len(diff_ids)
        written, config_bytes = await store.write(given([canonical(config)]))
        layers = [*below.layers, Descriptor(packed.media_type, digest, size_bytes)]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": Descriptor(CONFIG, written, config_bytes).to_json(),
            "layers": [each.to_json() for each in layers],
        }
        await store.tag("uv", canonical(manifest), MANIFEST, here())

    asyncio.run(make())
    return f"oci:{layout}:uv"


class Buildah:
    """buildah with a store of its own, that has the base."""

    def __init__(self, folder: Path, bentoml: BentoMl, base_name: str) -> None:
        self._folder, self._bentoml = folder, bentoml
        (folder / "bin").mkdir(parents=True)
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/root"\nrunroot = "{folder}/run"\n'
        )
        # BentoML gives buildah its options in a form that buildah refuses, so they are put in here.
        wrapper = folder / "bin" / "buildah"
        wrapper.write_text(
            '#!/bin/sh\n[ "$1" = build ] || exec /usr/bin/buildah "$@"\nshift\n'
            'exec /usr/bin/buildah bud --isolation chroot --network host --pull-never --layers "$@"\n'
        )
        wrapper.chmod(0o755)
        self.env = {
            **bentoml.env,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }
        self.run("skopeo", "copy", "-q", base_name, "containers-storage:docker.io/library/python:3.11-slim")

    def run(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def build(self, tag: str, image: str) -> None:
        """Build the image of a bento and push it."""
        self.run(str(self._bentoml.bin / "bentoml"), "containerize", tag, "--backend", "buildah", "-t", "bench:1")
        self.run("buildah", "push", "--quiet", "--tls-verify=false", "bench:1", f"docker://{image}")

    def close(self) -> None:
        """Remove what it keeps; its mounts first."""
        for command in (["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run(["buildah", *command], env=self.env, capture_output=True)


def size_mib(image: str, env: dict[str, str]) -> float:
    """Of an image's layers as they lie in the registry."""
    shown = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{image}"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    manifest = json.loads(shown)
    if "manifests" in manifest:
        return size_mib(f"{image.rpartition(':')[0]}@{manifest['manifests'][0]['digest']}", env)
    return sum(int(layer["size"]) for layer in manifest["layers"]) / (1 << 20)
