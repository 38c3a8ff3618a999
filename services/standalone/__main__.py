"""`python -m services.standalone`: what `ekiben up` starts."""

import argparse
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
    arguments = parser.parse_args()
    endings.run(run(Settings(data=arguments.data.resolve(), host=arguments.host, port=arguments.port)))


if __name__ == "__main__":
    main()
