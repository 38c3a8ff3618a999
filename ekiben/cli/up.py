"""`ekiben up`: everything on this machine."""

import os
import sys
from pathlib import Path

import click


def default_data() -> Path:
    """Where the data is unless told otherwise: `$EKIBEN_DATA`, or `~/.local/share/ekiben`."""
    if os.environ.get("EKIBEN_DATA"):
        return Path(os.environ["EKIBEN_DATA"]).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path("~/.local/share").expanduser()) / "ekiben"


@click.command()
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="Folder for everything it keeps.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7400, show_default=True, help="Port; 0 takes a free one."
)
def up(data: Path | None, host: str, port: int) -> None:
    """Start the whole suite on this machine, until Ctrl-C.

    The first start makes the data folder (--data, $EKIBEN_DATA, or ~/.local/share/ekiben), the user admin, and an
    admin token in DATA/admin-token. A later start on the same data brings every deployment back.

    Everything else has a default, and a setting in the environment: docs/settings.md lists them.
    """
    # -P: a folder named `services` where the user stands must not be taken for ours.
    command = [sys.executable, "-P", "-m", "services.standalone"]
    command += ["--data", str((data or default_data()).expanduser().resolve()), "--host", host, "--port", str(port)]
    sys.stdout.flush()
    os.execv(sys.executable, command)
