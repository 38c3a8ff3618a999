"""python -m services.deployer: the deployer as a process of its own."""

from services.deployer.app import open_deployer
from services.deployer.settings import Settings
from services.kernel.app import run_service

if __name__ == "__main__":
    run_service("deployer", open_deployer, Settings)
