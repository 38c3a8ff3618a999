"""The first process of a replica's container: takes what it is to run from a file, and becomes it.

Usage: `python inside.py FILE`. The file holds `{"argv": […], "env": {…}}`, with the values of secrets: it is removed
before anything else happens. A command line, or the engine's description of the container, others could read.

Standard library only, and Python 3.7: images bring old environments.
"""

# mypy: ignore-errors
# ruff: noqa: PTH108

import json
import os
import sys


def main(file):
    """Become the server."""
    with open(file) as told:
        start = json.load(told)
    os.unlink(file)
    env = dict(os.environ)
    env.update(start["env"])
    os.execve(sys.executable, [sys.executable, *start["argv"]], env)


if __name__ == "__main__":
    main(sys.argv[1])
