"""`python -m services.standalone`: what `ekiben up` starts."""

import argparse
import os
from pathlib import Path

from services.kernel import endings
from services.standalone.app import run
from services.standalone.settings import Settings


def main() -> None:
    """Read the command line and serve; what stops the start is told in sentences."""
    parser = argparse.ArgumentParser(
        prog="ekiben up",
        description="Everything on this machine, until Ctrl-C. Each service's own settings are read from the "
        "environment: EKIBEN_REGISTRY_…, EKIBEN_BUILDER_…, EKIBEN_DEPLOYER_…, EKIBEN_RECORDER_…, EKIBEN_GATEWAY_… "
        "and EKIBEN_SERVER_…; docs/settings.md lists them.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder for everything it keeps")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7400, help="public port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--database", default="", help="PostgreSQL for all services, each in a schema of its own")
    parser.add_argument("--database-password-file", type=Path, help="file with its password")
    parser.add_argument("--blobs", default="", help="where blobs are kept, such as s3://bucket")
    arguments = parser.parse_args()
    password_file = arguments.database_password_file
    settings = Settings(
        data=arguments.data.resolve(),
        host=arguments.host,
        port=arguments.port,
        # Whoever starts it may pass the URL by the environment, where other users of the machine do not see it.
        database=arguments.database or os.environ.get("EKIBEN_DATABASE_URL", ""),
        database_password_file=password_file.resolve() if password_file else None,
        blobs=arguments.blobs or os.environ.get("EKIBEN_BLOBS_URL", ""),
    )
    endings.run(run(settings))


if __name__ == "__main__":
    main()
