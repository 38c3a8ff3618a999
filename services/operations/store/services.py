"""Which tables each service has, and who migrates them."""

import importlib
from collections.abc import Sequence

import sqlalchemy as sa

from services.kernel.migrations import version_table


def package_of(service: str) -> str:
    """Its migrations: `services.registry.migrations`."""
    return f"services.{service}.migrations"


def metadata_of(service: str) -> sa.MetaData:
    """The tables that this release's service works with."""
    metadata = importlib.import_module(f"services.{service}.store").metadata
    assert isinstance(metadata, sa.MetaData)
    return metadata


def tables_of(service: str) -> Sequence[sa.Table]:
    """The same, parents before children."""
    return metadata_of(service).sorted_tables


def version_table_of(service: str) -> str:
    """The table that holds the revision of its tables."""
    return version_table(package_of(service))
