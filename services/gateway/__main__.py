"""`python -m services.gateway`: the gateway as a process of its own. Settings: `EKIBEN_GATEWAY_…`."""

from services.gateway.app import open_gateway
from services.gateway.settings import Settings
from services.kernel.app import run_service

if __name__ == "__main__":
    run_service("gateway", open_gateway, Settings)
