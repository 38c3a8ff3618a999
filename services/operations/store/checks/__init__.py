"""Questions that a check asks of rows. Each is a function of a connection that shows one moment.

- `tables.py`: of any service: revisions, what the database itself says
- `registry.py`, `labels.py`, `files.py`: versions, labels, aliases, uploads, blobs and their files, secrets
- `others.py`: deployer, builder and recorder, and what they name in the registry
"""
