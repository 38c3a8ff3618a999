"""What `ekiben models`, `bentos` and `repositories` share: listing, restoring and purging what was deleted."""

from typing import Any

from ekiben.cli.output import age, collect, last, moment, print_items, said, size, tag
from ekiben.client import Client
from ekiben.errors import AlreadyExists
from ekiben.registry.v1 import deletions_pb2 as pb

COLUMNS = [
    ("DELETED", lambda d: tag(d.resource)),
    ("SIZE", lambda d: size(d.size_bytes) if d.size_bytes else ""),
    ("BY", lambda d: last(d.deleter)),
    ("AGE", lambda d: age(d.delete_time)),
    ("UNTIL", lambda d: moment(d.expire_time)),
    ("UID", lambda d: last(d.name)),
]


async def print_deleted(client: Client, parent: str, limit: int, output: str) -> None:
    """List what was deleted and can be restored."""
    print_items(await collect(client.deletions.list(parent, limit=limit)), COLUMNS, output, empty="Nothing to restore.")


async def restore(client: Client, resources: Any, name: str, uid: str) -> Any:
    """Restore the version with this uid, or else the one of this name that was deleted last."""
    deleted = f"deletedVersions/{uid}" if uid else (await client.deletions.find(name)).name
    restored = await client.deletions.undelete(deleted)
    said(f"Restored {tag(restored.resource)}.")
    return await resources.get(restored.resource)


async def restore_all(client: Client, repository: str) -> list[pb.DeletedVersion]:
    """Restore the versions of a repository, of each name the one that was deleted last; names in use are left."""
    restored, seen = [], set()
    for found in await collect(client.deletions.list(repository)):
        if found.resource in seen:
            continue
        seen.add(found.resource)
        try:
            restored.append(await client.deletions.undelete(found.name))
        except AlreadyExists:
            said(f"{tag(found.resource)} exists; the deleted one is left.")
    return restored


async def purge(client: Client, name: str, uid: str) -> None:
    """Delete for good the deleted version with this uid, or else the one of this name that was deleted last."""
    deleted = f"deletedVersions/{uid}" if uid else (await client.deletions.find(name)).name
    await client.deletions.purge(deleted)
    said(f"Purged {tag(name)}.")
