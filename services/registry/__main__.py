"""python -m services.registry: the registry alone, settings from EKIBEN_REGISTRY_… and EKIBEN_SERVER_…"""

import asyncio
import sys

from services.kernel.app import serve
from services.kernel.settings import ServerSettings, SettingsError, load
from services.registry.app import open_registry
from services.registry.settings import Settings

try:
    settings, server = load(Settings, "EKIBEN_REGISTRY"), load(ServerSettings, "EKIBEN_SERVER")
    asyncio.run(serve([open_registry(settings)], server, name="registry"))
except SettingsError as exc:
    sys.exit(str(exc))
