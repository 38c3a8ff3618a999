"""Manifests: kept to the letter as they were sent, completed only in replies. Pure functions."""

import json
from typing import Any

HUGE_BYTES = 100 << 20
"""From this size on the client uploads in parts: the size of one of its parts."""

_decoder = json.JSONDecoder()
_BLANK = " \t\r\n"


def raw_member(body: str, name: str) -> str:
    """The text of one member of a JSON object, exactly as it stands there; empty where it is absent or null.

    The body must be JSON that was read before.
    """
    at, found = body.index("{") + 1, ""
    while True:
        at = _skip(body, at, _BLANK + ",")
        if body[at] == "}":
            return "" if found == "null" else found
        key, at = _decoder.raw_decode(body, at)
        start = _skip(body, at, _BLANK + ":")
        _, at = _decoder.raw_decode(body, start)
        if key == name:  # the last one counts, as it does for json.loads
            found = body[start:at]


def _skip(body: str, at: int, characters: str) -> int:
    while body[at] in characters:
        at += 1
    return at


def read_manifest(text: str) -> dict[str, Any]:
    """A stored manifest; an empty one where nothing readable is stored."""
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def bento_manifest(text: str, repository: str, version: str) -> dict[str, Any]:
    """What a client reads as the manifest of a bento.

    1.0 and 1.1 send neither name, version nor entry service, without which `bentoml deploy` of 1.4 crashes or
    names services wrongly; the entry service is then called like the repository.
    """
    manifest = _complete(
        read_manifest(text),
        {"service": "", "bentoml_version": "", "size_bytes": 0},
        {"apis": {}, "models": [], "services": [], "envs": [], "schema": {}},
    )
    for key, value in (("name", repository), ("version", version), ("entry_service", repository)):
        manifest[key] = manifest.get(key) or value
    return manifest


def model_manifest(text: str) -> dict[str, Any]:
    """What a client reads as the manifest of a model."""
    return _complete(
        read_manifest(text),
        {"module": "", "api_version": "v1", "bentoml_version": "", "size_bytes": 0},
        {"metadata": {}, "context": {}, "options": {}},
    )


def _complete(manifest: dict[str, Any], scalars: dict[str, Any], collections: dict[str, Any]) -> dict[str, Any]:
    """Add what the client's reader requires; a collection that is null would crash it, an absent one would not."""
    completed = dict(manifest)
    for key, value in scalars.items():
        if completed.get(key) is None:
            completed[key] = value
    for key, value in collections.items():
        if completed.get(key, value) is None:
            completed[key] = value
    return completed


def size_bytes(text: str) -> int:
    """The size that a manifest claims, 0 where it claims none."""
    size = read_manifest(text).get("size_bytes")
    return size if isinstance(size, int) else 0
