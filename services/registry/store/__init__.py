"""The registry's tables and queries: plain functions over a connection, so that a use case is one transaction.

- `tables.py`: the tables; `metadata` is what migrations are compared with.
- `catalog.py`: repositories, versions, labels; `searches.py` turns a filter into SQL.
- `aliases.py`: aliases and their history.
- `quotas.py`: what organizations keep, and may keep.
- `uploads.py`, `blobs.py`: uploads, and which blobs are held.
- `accounts.py`: organizations, users, API tokens, logins; `secrets.py`; `audit.py`.
"""

from services.registry.store.tables import metadata

__all__ = ["metadata"]
