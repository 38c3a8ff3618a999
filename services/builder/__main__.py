"""python -m services.builder: the builder as a process of its own."""

from services.builder.app import open_builder
from services.builder.settings import Settings
from services.kernel.app import run_service

if __name__ == "__main__":
    run_service("builder", open_builder, Settings)
