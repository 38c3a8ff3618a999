"""Runs benchmarks by name; all of them without a name."""

import argparse
import importlib

NAMES = (
    "dataplane",
    "transfer",
    "deploy",
    "startup",
    "getmodel",
    "registry.transfer",
    "images",
    "kubernetes.deploy",
    "kubernetes.scale",
    "kubernetes.fleet",
)


def main() -> None:
    """Parse the command line and run each in turn: two cores are few."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, of which the median counts")
    arguments = parser.parse_args()
    for name in arguments.names or NAMES:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}")
        importlib.import_module(f"benchmarks.{name}").run(arguments.rounds)


if __name__ == "__main__":
    main()
