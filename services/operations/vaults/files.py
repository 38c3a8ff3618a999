"""What vaults of every kind say of their files."""

from ekiben.errors import NotFound


def no_file(path: str) -> NotFound:
    """A file of the backup is not there."""
    return NotFound(
        f"The backup has no {path}: it is not complete. Take another snapshot.", reason="BACKUP_FILE_MISSING", path=path
    )
