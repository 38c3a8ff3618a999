"""How the suite is shared among pytest's workers (`pytest -n 2`): file by file, the long ones first.

Tests of one file share what is dear to start; tests of the folder `kubernetes` share one cluster, of which a machine has
one at a time, so that they go to one worker.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

_FOLDERS = ("standalone", "faults", "kubernetes", "contract", "api", "properties", "unit")
"""In this order: a long file that comes last leaves the other workers without work."""


class Scheduling(LoadScopeScheduling):
    """See the module."""

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        return str(path.parent) if path.parent.name == "kubernetes" else str(path)


def ordered(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests by folder; within one the order stays."""

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return _FOLDERS.index(folder) if folder in _FOLDERS else len(_FOLDERS)

    return sorted(items, key=place)
