"""What the objects of a replica set are called and labelled, and what their annotations say of it. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.telemetry import PodTelemetry

Object = dict[str, Any]

PORT = 3000
CONTAINER = "bento"

PREFIX = "ekiben.dev"
INSTALLATION = f"{PREFIX}/installation"
SET = f"{PREFIX}/set"
UID = f"{PREFIX}/deployment-uid"
ABOUT = f"{PREFIX}/about"
"""Annotation with what `SetStatus` says of the set, so that a deployer which starts anew knows it."""
APPLIED = f"{PREFIX}/applied"
"""Annotation with the digest of what was applied last."""
FIELD_MANAGER = "ekiben"


@dataclass(frozen=True)
class Where:
    """What all sets of a cluster share."""

    installation: str
    """Whose objects these are; others are never touched."""
    namespace: str
    pull_secret: str = ""
    """Name of a Secret of the namespace with the credentials for images."""
    telemetry: PodTelemetry = field(default_factory=PodTelemetry, compare=False)
    """Where pods send spans and monitored values."""
    pod_security: str = "restricted"
    """The level of the pod security standards to which patches are held."""
    signed_only: bool = False
    """Whether only images may run whose signatures were looked at: none of a patch's, then."""


def name_of(key: str) -> str:
    """The name of a set's objects. Other services of the revision compute it too."""
    return f"ekiben-{key}"


def object_name(item: Object) -> str:
    """An object's name."""
    return str(item["metadata"]["name"])


def label(item: Object, key: str) -> str:
    """A label of an object; empty for none."""
    return str((item["metadata"].get("labels") or {}).get(key) or "")


def labels_of(spec: SetSpec, where: Where) -> dict[str, str]:
    """Of all the objects of a set, its pods included."""
    return {
        "app.kubernetes.io/managed-by": "ekiben",
        "app.kubernetes.io/name": label_of(spec.deployment.partition("/")[2]),
        "app.kubernetes.io/component": label_of(spec.service),
        "app.kubernetes.io/version": f"r{spec.revision}",
        INSTALLATION: where.installation,
        UID: spec.deployment_uid,
        SET: spec.key,
    }


def about(spec: SetSpec) -> str:
    """See ABOUT."""
    known = (spec.deployment, spec.deployment_uid, spec.revision, spec.target, spec.service)
    names = ("deployment", "deployment_uid", "revision", "target", "service")
    return json.dumps(dict(zip(names, known, strict=True)))


def facts_of(annotations: Mapping[str, str]) -> Mapping[str, Any]:
    """What `about` wrote. Raises ValueError where that is not there."""
    found = json.loads(annotations.get(ABOUT) or "null")
    if not isinstance(found, dict):
        raise ValueError("no annotation says what this set is")
    return found


def label_of(text: str) -> str:
    """The text as a label's value can be."""
    kept = "".join(char if (char.isalnum() and char.isascii()) or char in "-_." else "-" for char in text)[:63]
    return kept.strip("-_.") or "x"
