"""Blobs in a bucket of S3 or of a server that speaks like it.

- `location.py`: the URL of a store.
- `bucket.py`: requests, retries, errors.
- `records.py`: what the bucket knows of an upload that is under way.
- `gates.py`, `sending.py`: parts that pass through the registry.
- `joining.py`: parts become one object.
- `reading.py`: objects are read, and checked while they are.
- `store.py`: the BlobStore, and the order of its steps.
"""

from services.content.blobs.s3.store import S3Assembly, S3BlobStore, open_s3

__all__ = ["S3Assembly", "S3BlobStore", "open_s3"]
