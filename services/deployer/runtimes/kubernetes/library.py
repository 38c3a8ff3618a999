"""`kubernetes_asyncio`, imported without what nobody here uses of it.

Its dynamic client imports a validator of manifests wherever one is installed, which compiles grammars for four seconds:
longer than all the rest of a deployer takes to start.
"""

import sys

_VALIDATOR = "kubernetes_validate"
_there = _VALIDATOR in sys.modules
if not _there:
    sys.modules[_VALIDATOR] = None  # type: ignore[assignment]
try:
    from kubernetes_asyncio import client, config
finally:
    if not _there:
        del sys.modules[_VALIDATOR]

__all__ = ["client", "config"]
