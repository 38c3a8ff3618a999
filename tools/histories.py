"""Says whether the migrations of each service are one chain: two changes side by side may both have taken a number."""

import sys
from pathlib import Path

from services.kernel.migrations import history_of

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Read each history; fail with what is wrong with it."""
    for folder in sorted(ROOT.glob("services/*/migrations")):
        try:
            _, revisions = history_of(folder)
        except ValueError as exc:
            sys.exit(f"{exc} Give the newer one the next number, and the other's revision as its down_revision.")
        files = len(list((folder / "versions").glob("[!_]*.py")))
        if files != len(revisions):
            sys.exit(f"{folder} has {files} files of {len(revisions)} revisions: two of them have the same number.")


if __name__ == "__main__":
    main()
