"""python -m services.registry: the registry alone, settings from EKIBEN_REGISTRY_… and EKIBEN_SERVER_…"""

from services.kernel.app import serve
from services.kernel.endings import run
from services.kernel.settings import ServerSettings, load
from services.registry.app import open_registry
from services.registry.settings import Settings


async def main() -> None:
    """Serve until a signal. The registry has no peers."""
    settings, server = load(Settings, "EKIBEN_REGISTRY"), load(ServerSettings, "EKIBEN_SERVER")
    await serve([open_registry(settings)], server, name="registry")


if __name__ == "__main__":
    run(main())
