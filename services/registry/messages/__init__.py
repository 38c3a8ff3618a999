"""Between protos and the domain, both ways side by side: plain functions.

- `catalog.py`: repositories, models, bentos.
- `uploads.py`: uploads and signed URLs.
- `identities.py`: principals, users, tokens, secrets, audit entries.
"""
