"""Images in a registry, by the OCI distribution API.

- `names.py`: HOST/REPOSITORY[:TAG|@DIGEST].
- `options.py`, `logins.py`: what this machine knows of registries, where docker and podman keep it.
- `tokens.py`, `client.py`: requests with logins, redirects and retries; `problems.py`: what answers mean.
- `uploads.py`, `downloads.py`: a blob on its way there and back.
- `store.py`: the adapter of ImageStore.
"""
