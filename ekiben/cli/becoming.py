"""What a command does that needs more than the client: it becomes one of the servers' programs."""

import os
import sys
from typing import NoReturn


def become(module: str, *arguments: object) -> NoReturn:
    """Run the `main` of a module of the servers with these arguments instead of this process."""
    # -P: a folder named `services` where the user stands must not be taken for ours.
    # -X utf8: names and files are UTF-8 whatever the locale says; `LC_ALL=de_DE` is ISO 8859-1.
    program = [sys.executable, "-P", "-X", "utf8", "-m", "ekiben.launch", module]
    sys.stdout.flush()
    os.execv(sys.executable, [*program, *map(str, arguments)])
