"""Programs that Ctrl-C ends without a traceback, from their first import on.

    ekiben …                                     the command itself
    python -P -m ekiben.launch MODULE ARGUMENT…  what the command becomes: the `main` of one of the servers' modules

Importing a program takes a good part of a second, in which Python raises KeyboardInterrupt out of whichever import is
at work. Until `main` is there to say something, the signal ends the process as it ends any other.
"""

import signal
import sys
from importlib import import_module
from typing import NoReturn

_quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _quiet:  # whoever ignores it, as a shell does for what runs in the background, goes on ignoring it
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command() -> NoReturn:
    """The ekiben command."""
    from ekiben.cli import main

    _listen()
    main()


def start() -> NoReturn:
    """The program that the command line names."""
    name, *sys.argv[1:] = sys.argv[1:]
    module = import_module(name)
    sys.argv[0] = name
    _listen()
    try:
        status = module.main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        status = 1
    sys.exit(status)


def _listen() -> None:
    if _quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    start()
