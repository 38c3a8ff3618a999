"""The deployer's tables and queries; each returns domain objects. One implementation for SQLite and PostgreSQL.

`deployment_rows.py` holds deployments, their revisions and clusters; `terminal_rows.py` terminals and their recordings.
"""

from services.deployer.store.deployment_rows import Store, clusters, deployments, metadata, revisions
from services.deployer.store.terminal_rows import TerminalStore

__all__ = ["Store", "TerminalStore", "clusters", "deployments", "metadata", "revisions"]
