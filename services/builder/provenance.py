"""Where an image comes from: the predicate of SLSA's provenance v1. Pure.

It says what was asked for, and the digest of everything that went in; no time and no number of a build, so that equal
builds say the same, whoever makes them. Source: slsa.dev/spec/v1.0/provenance.
"""

from typing import Any

from services.builder.domain import ASSEMBLER_VERSION
from services.builder.materials import Material, Materials

BUILD_TYPE = "https://ekiben.dev/build-types/image/v1"
"""A bento, its models and its locked environment as layers on a base; docs/images.md says how."""


def provenance_of(materials: Materials, builder: str, version: str) -> dict[str, Any]:
    """The predicate.

    Args:
        builder: a URI that names who built it, and thereby how far to trust it.
        version: of Ekiben.
    """
    dependencies = [
        _dependency(f"bento:{materials.bento.name}", materials.bento),
        _dependency(materials.base.name or "base", materials.base),
        *(_dependency(f"model:{each.name}", each) for each in materials.models),
        {"uri": "lock:requirements.txt", "digest": {"sha256": materials.lock_digest.hex}},
        *({"uri": f"pkg:pypi/{each.name}@{each.version}", **_digest(each.hashes)} for each in materials.packages),
    ]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "bento": materials.bento.name,
                "base": materials.base.name,
                "platform": str(materials.platform),
            },
            "internalParameters": {
                "assembler": ASSEMBLER_VERSION,
                "environment": materials.environment_digest,
                "python": materials.python,
            },
            "resolvedDependencies": dependencies,
        },
        "runDetails": {"builder": {"id": builder, "version": {"ekiben": version}}},
    }


def _dependency(uri: str, material: Material) -> dict[str, Any]:
    return {"uri": uri, "digest": {"sha256": material.digest.hex}}


def _digest(hashes: tuple[str, ...]) -> dict[str, Any]:
    """The digest, where there is only one file that can have been installed."""
    return {"digest": {"sha256": hashes[0]}} if len(hashes) == 1 else {}
