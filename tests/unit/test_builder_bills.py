"""Bills of material and provenance of images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from services.builder import materials
from services.builder.bills import bill_of
from services.builder.materials import Materials
from services.builder.provenance import provenance_of
from services.content.digest import Digest
from services.content.images import LAYER, MANIFEST, Descriptor

ENVIRONMENT = f"sha256:{'ee' * 32}"
IMAGE = Descriptor(MANIFEST, Digest("ab" * 32), 1000)
LOCK = """\
# made by uv
bentoml==1.4.39 \\
    --hash=sha256:{a} \\
    --hash=sha256:{b}
Typing.Extensions==4.16.0 ; python_version >= "3.11" \\
    --hash=sha256:{c}
local-thing @ shipped:wheels/local_thing-1.0-py3-none-any.whl
""".format(a="a1" * 32, b="b2" * 32, c="c3" * 32)


def package(environment: Path, name: str, version: str, *lines: str) -> None:
    folder = environment / "lib/python3.11/site-packages" / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    head = [f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}", *lines]
    (folder / "METADATA").write_text("\n".join(head) + "\n\nA description.\n")


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    package(
        *(tmp_path, "bentoml", "1.4.39", "License: Apache-2.0", "Summary: Serving"),
        *("Requires-Dist: typing.extensions>=4", "Requires-Dist: not-installed; extra == 'x'", "Requires-Dist: %%"),
    )
    package(tmp_path, "typing_extensions", "4.16.0", "License-Expression: PSF-2.0")
    package(
        *(tmp_path, "local_thing", "1.0", "License: a text\n        of several lines"),
        "Classifier: License :: OSI Approved :: MIT License",
    )
    return tmp_path


def made(environment: Path) -> Materials:
    layers = [Descriptor(LAYER, Digest(f"{number}0" * 32), 100 + number).to_json() for number in range(1, 6)]
    annotations = {
        "dev.ekiben.bento": "summarizer:v1",
        "dev.ekiben.models": "embedder:m1",
        "dev.ekiben.bentoml-version": "1.4.39",
        "org.opencontainers.image.base.name": "docker://docker.io/library/python:3.11-slim",
        "org.opencontainers.image.base.digest": f"sha256:{'cd' * 32}",
    }
    ours = ["the user bentoml", "Python environment sha256:…", "model embedder:m1", "bento summarizer:v1"]
    config: dict[str, Any] = {
        "os": "linux",
        "architecture": "arm64",
        "variant": "v8",
        "history": [
            {"created_by": "ADD rootfs"},
            {"created_by": "ENV x", "empty_layer": True},
            *({"created_by": each, "comment": "ekiben"} for each in ours),
        ],
    }
    manifest = {"layers": layers, "annotations": annotations}
    return materials.materials_of(
        IMAGE,
        manifest,
        config,
        packages=materials.packages_of(environment, ENVIRONMENT, LOCK, environment / "remembered"),
        system=["pkg:deb/debian/libc6@2.36-9?arch=amd64&distro=debian-12"],
        environment_digest=ENVIRONMENT,
        lock=LOCK,
        python="3.11",
    )


def test_everything_in_the_image_is_found_with_the_layer_that_holds_it(environment: Path) -> None:
    found = made(environment)
    assert (found.bento.name, found.bento.digest.hex[:2], found.bento.size_bytes) == ("summarizer:v1", "50", 105)
    assert [(each.name, each.digest.hex[:2]) for each in found.models] == [("embedder:m1", "40")]
    assert str(found.platform) == "linux/arm64/v8"
    bentoml, local, typing = found.packages
    assert (bentoml.name, bentoml.requires, bentoml.license, len(bentoml.hashes)) == (
        "bentoml",
        ("typing-extensions",),
        "Apache-2.0",
        2,
    )
    assert (local.name, local.license, local.spdx, local.hashes) == ("local-thing", "MIT License", False, ())
    assert (typing.license, typing.spdx, typing.hashes) == ("PSF-2.0", True, ("c3" * 32,))


def test_the_bill_is_what_cyclonedx_says_and_the_same_each_time(
    environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bill = bill_of(made(environment))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.decode()) is None
    assert bill == bill_of(made(environment))
    content = json.loads(bill)
    assert "timestamp" not in content["metadata"]
    by_ref = {each["bom-ref"]: each for each in content["components"]}
    assert by_ref["pkg:pypi/typing-extensions@4.16.0"]["hashes"] == [{"alg": "SHA-256", "content": "c3" * 32}]
    assert "hashes" not in by_ref["pkg:pypi/bentoml@1.4.39"]  # which of its files was installed is not known
    assert by_ref["model:embedder:m1"]["type"] == "machine-learning-model"
    assert by_ref["pkg:deb/debian/libc6@2.36-9?arch=amd64&distro=debian-12"]["version"] == "2.36-9"
    needs = {each["ref"]: each.get("dependsOn", []) for each in content["dependencies"]}
    assert needs["pkg:pypi/bentoml@1.4.39"] == ["pkg:pypi/typing-extensions@4.16.0"]
    assert set(needs["bento:summarizer:v1"]) == {
        "model:embedder:m1",
        "pkg:pypi/bentoml@1.4.39",
        "pkg:pypi/local-thing@1.0",
    }
    assert content["metadata"]["component"]["purl"].startswith("pkg:oci/summarizer@sha256")


def test_the_packages_of_an_environment_are_read_once(environment: Path) -> None:
    first = made(environment)
    shutil.rmtree(environment / "lib")
    assert made(environment) == first
    (remembered,) = (environment / "remembered").iterdir()
    remembered.write_text("[{}]")  # damaged: read again
    assert made(environment).packages == []


def test_an_image_without_packages_or_models_has_a_bill_too(tmp_path: Path) -> None:
    found = made(tmp_path / "nothing")
    assert not found.packages
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill_of(found).decode()) is None


def test_the_provenance_names_everything_that_went_in_and_no_time(environment: Path) -> None:
    said = provenance_of(made(environment), "https://ekiben.dev/builders/offline", "1.0")
    assert said == provenance_of(made(environment), "https://ekiben.dev/builders/offline", "1.0")
    definition = said["buildDefinition"]
    assert definition["externalParameters"]["bento"] == "summarizer:v1"
    by_uri = {each["uri"]: each.get("digest", {}).get("sha256", "") for each in definition["resolvedDependencies"]}
    assert by_uri["docker://docker.io/library/python:3.11-slim"] == "cd" * 32
    assert by_uri["model:embedder:m1"] == "40" * 32
    assert by_uri["pkg:pypi/typing-extensions@4.16.0"] == "c3" * 32
    assert by_uri["pkg:pypi/bentoml@1.4.39"] == ""
    assert len(by_uri["lock:requirements.txt"]) == 64
    assert said["runDetails"]["builder"]["id"] == "https://ekiben.dev/builders/offline"
    assert "metadata" not in said["runDetails"]
