"""Tables of the builder, and every statement on them. One implementation for SQLite and PostgreSQL."""

from services.builder.store.builds import Store
from services.builder.store.images import ImageRows
from services.builder.store.tables import builds, environments, images, metadata

__all__ = ["ImageRows", "Store", "builds", "environments", "images", "metadata"]
