"""The registry: what exists, and who may touch it.

It keeps repositories and versions of models and bentos, the uploads that fill them, users, API tokens, secrets and
the audit log, in SQL; and the bytes of archives as blobs named by their digest. It builds and runs nothing.

Invariants:

- A name never dangles: bytes are durable before a row names them, and the collector deletes no blob that a row names
  or that an upload has claimed (`store/blobs.py`).
- A manifest is kept to the letter. Tokens are kept as hashes, secrets sealed.
- What was readable stays readable while a new upload of it is under way.

Read `domain.py`, `identities.py` and `search.py` (pure) first; then the use cases `catalog.py`, `aliases.py`,
`uploads.py`, `accounts.py`, `logins.py`, `secrets.py`, `audit.py`; then `store/`. `servicer/` and `messages/` face
gRPC, `bytes.py` faces HTTP, `collector.py` is the loop, `first_start.py`, `sealing.py` and `signing.py` what their
names say, and `app.py` puts all together.
"""
