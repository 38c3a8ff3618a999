"""Whether what lives in the cluster is what was asked. Pure.

The cluster adds defaults and writes quantities its own way, so what lives is never literally what was applied. A
print tells whether anything but status changed since; `holds` tells of something that nobody remembers applying
whether it has all that it should.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from services.deployer.quantities import quantity
from services.deployer.runtimes.kubernetes.names import Object

_IGNORED = ("managedFields", "resourceVersion", "generation", "selfLink")


def print_of(live: Object) -> str:
    """Equal while nobody changed the object: status, what every write changes, and what lists omit are left out."""
    kept = {key: value for key, value in live.items() if key not in ("status", "metadata", "kind", "apiVersion")}
    kept["metadata"] = {key: value for key, value in live["metadata"].items() if key not in _IGNORED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def digest_of(made: Object | Sequence[Object]) -> str:
    """Equal for equal objects. Secret values are in it, so it is one-way."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


def holds(live: Object, wanted: Object) -> bool:
    """Whether all that is wanted is there, whatever else is there too."""
    return _holds(live, {key: value for key, value in wanted.items() if key != "apiVersion"})  # Lists omit it.


def _holds(live: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            return not wanted and not live
        return all(_holds(live.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        found = live or []
        if not any(isinstance(each, Mapping) for each in wanted):
            return list(found) == list(wanted)
        # Lists of objects are merged by their keys; others may have put something between.
        return all(any(_holds(one, each) for one in found) for each in wanted)
    if isinstance(wanted, str) and isinstance(live, str | int | float) and live != wanted:
        amount = _quantity(wanted)
        return amount is not None and amount == _quantity(str(live))
    return bool(live == wanted) or (wanted in (None, "", 0, False) and live is None)


def _quantity(text: str) -> Decimal | None:
    try:
        return quantity(text)
    except ValueError:
        return None
