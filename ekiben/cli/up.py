"""`ekiben up`: everything on this machine."""

import os
from pathlib import Path

import click

from ekiben.cli.becoming import become


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
@click.option(
    "--database",
    metavar="URL",
    envvar="EKIBEN_DATABASE_URL",
    help="PostgreSQL instead of SQLite files: postgresql://user@host/name.  [env: EKIBEN_DATABASE_URL]",
)
@click.option(
    "--database-password-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="EKIBEN_DATABASE_PASSWORD_FILE",
    help="File with its password; PGPASSFILE and PGPASSWORD do too.",
)
@click.option(
    "--blobs",
    metavar="URL",
    envvar="EKIBEN_BLOBS_URL",
    help="Where archives are kept instead of a folder: s3://bucket/prefix.  [env: EKIBEN_BLOBS_URL]",
)
@click.option(
    "--runtime",
    type=click.Choice(["process", "podman", "kubernetes"]),
    envvar="EKIBEN_DEPLOYER_RUNTIME",
    help="Run replicas as processes (by default), as containers, or as pods.  [env: EKIBEN_DEPLOYER_RUNTIME]",
)
def up(
    data: Path | None,
    host: str,
    port: int,
    database: str | None,
    database_password_file: Path | None,
    blobs: str | None,
    runtime: str | None,
) -> None:
    """Start the whole suite on this machine, until Ctrl-C.

    The first start makes the data folder (--data, $EKIBEN_DATA, or ~/.local/share/ekiben), the user admin, and an
    admin token in DATA/admin-token. A later start on the same data brings every deployment back.

    Everything else has a default, and a setting in the environment: docs/settings.md lists them.

    \b
    Examples:
      ekiben up
      ekiben up --database postgresql://ekiben@db.example.com/ekiben?sslmode=verify-full
      ekiben up --database postgresql://ekiben@/ekiben?host=/run/postgresql --blobs s3://ekiben
      EKIBEN_BUILDER_BASES=oci:/srv/bases:{python} ekiben up --runtime podman
    """
    arguments = ["--data", (data or default_data()).expanduser().resolve(), "--host", host, "--port", port]
    if database_password_file is not None:
        arguments += ["--database-password-file", database_password_file.expanduser().resolve()]
    # By the environment: the command line of a process is there for every user of the machine to see.
    os.environ.update(
        {name: url for name, url in (("EKIBEN_DATABASE_URL", database), ("EKIBEN_BLOBS_URL", blobs)) if url}
    )
    if runtime:
        os.environ["EKIBEN_DEPLOYER_RUNTIME"] = runtime
    become("services.standalone.__main__", *arguments)
