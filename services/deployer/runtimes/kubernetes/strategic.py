"""Strategic merge patches of a pod template, as the API server applies them. Pure.

A patch says only what differs. Maps are merged and null deletes; lists are replaced, but for those of which Kubernetes
says by what their items are known: these are merged item by item. `$patch: delete` and `$patch: replace` empty a
map, and take away or replace an item, `$retainKeys` lists what is kept besides.

Source: kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch; the patchStrategy and
patchMergeKey tags of k8s.io/api/core/v1 and meta/v1, of 1.30 to 1.36.
"""

import copy
from collections.abc import Mapping
from typing import Any

from ekiben.errors import InvalidArgument

MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "schedulingGates": "name",
    "resourceClaims": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ownerReferences": "uid",
}
"""By what the items of a list are known. No list of a pod template has one of these names and no key."""
_DEPTH = 40


def merged(original: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The pod template with the patch. Neither is changed.

    Raises:
        InvalidArgument: it is no such patch (PATCH_INVALID).
    """
    if unknown := sorted(set(patch) - {"metadata", "spec"}):
        raise _invalid("", f"a pod template has metadata and spec, not {', '.join(unknown)}")
    return _map(copy.deepcopy(dict(original)), patch, "", 0)


def _map(original: dict[str, Any], patch: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
    if depth > _DEPTH:
        raise _invalid(path, "it is nested too deeply")
    how = patch.get("$patch", "merge")
    if how == "delete":
        return {}
    if how == "replace":
        original = {}
    elif how != "merge":
        raise _invalid(path, f"$patch is {how!r}; it must be merge, replace or delete")
    for key, value in patch.items():
        here = f"{path}.{key}" if path else key
        if key in ("$patch", "$retainKeys"):
            continue
        if key.startswith("$"):
            raise _invalid(here, "it is no directive that is known here: $patch, $retainKeys")
        if value is None:
            original.pop(key, None)
        elif isinstance(value, Mapping):
            known = original.get(key)
            original[key] = _map(known if isinstance(known, dict) else {}, value, here, depth + 1)
        elif isinstance(value, list) and key in MERGE_KEYS:
            known = original.get(key)
            original[key] = _list(known if isinstance(known, list) else [], value, MERGE_KEYS[key], here, depth)
        else:
            original[key] = copy.deepcopy(value)
    if "$retainKeys" in patch:
        original = {key: value for key, value in original.items() if key in patch["$retainKeys"]}
    return original


def _list(original: list[Any], patch: list[Any], by: str, path: str, depth: int) -> list[Any]:
    whole = {"$patch": "replace"}
    found = [] if whole in patch else original
    for item in patch:
        if item == whole:
            continue
        if not isinstance(item, Mapping) or by not in item:
            raise _invalid(path, f"each item needs a {by}, by which it is known")
        here = f"{path}[{item[by]}]"
        index = next((i for i, one in enumerate(found) if isinstance(one, dict) and one.get(by) == item[by]), None)
        if item.get("$patch") == "delete":
            if index is not None:
                del found[index]
        elif index is None:
            found.append(_map({}, item, here, depth + 1))
        else:
            found[index] = _map(found[index], item, here, depth + 1)
    return found


def _invalid(path: str, why: str) -> InvalidArgument:
    at = f" at {path}" if path else ""
    return InvalidArgument(f"The patch of the pod is wrong{at}: {why}.", reason="PATCH_INVALID")
