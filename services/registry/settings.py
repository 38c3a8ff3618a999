"""Settings of the registry."""

from dataclasses import dataclass
from pathlib import Path

from services.kernel.settings import DatabaseSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings(DatabaseSettings):
    """Environment: `EKIBEN_REGISTRY_…`."""

    blobs_url: str
    """Where blobs are kept: `file:///absolute/folder`, owned by this process alone, or
    `s3://bucket/prefix?endpoint=…&region=…&path_style=true&part_size=16MiB` (all of the query is optional, and
    `public_endpoint` is one more). Credentials are botocore's to find: environment, profile, web identity."""
    secrets_key_file: Path
    """The key that seals secrets and signs URLs; made with mode 0600 when absent. Losing it loses every secret: back
    it up, apart from the database. Several registries need the same one."""
    admin_token_file: Path | None = None
    """Where the first admin's API token is written, mode 0600. When the file is missing, a new token is made and the
    old one stops working: delete it and restart to get back in. Of several registries one names it (or all the same
    file on a shared folder); the others leave it out."""
    blobs_listen: str = "127.0.0.1:0"
    """Where bytes are served over HTTP: `host:port` or `unix:/path`. The gateway forwards `/blobs/` to it."""
    blobs_direct: bool = True
    """Whether clients send and fetch content at URLs of the bucket itself, where the blobs lie in one. False where they
    cannot reach it: all content then passes through the registry."""
    upload_expire_s: float = 24 * 3600
    """Seconds after which an upload that was not completed is given up and its parts are freed. BentoML's client takes
    at most ten hours for one PUT; a day leaves room for many."""
    garbage_grace_s: float = 600
    """Seconds for which a blob is kept after it was last uploaded, whoever names it: a download that was signed just
    before the last name went still succeeds."""
    delete_grace_s: float = 7 * 24 * 3600
    """Seconds for which a deleted model or bento can be restored; its bytes stay that long. A week leaves room for who
    was away when it was deleted. 0 deletes for good."""
    collect_interval_s: float = 300
    """Seconds between two rounds of the collector."""
    organization: str = "default"
    """Name of the one organization, made on first start."""
    admin_user: str = "admin"
    """Name of the first user, made on first start."""

    def __post_init__(self) -> None:
        faults = self.database_faults()
        faults += [
            f"{name} is {value}; it must be positive."
            for name, value in (
                ("upload_expire_s", self.upload_expire_s),
                ("collect_interval_s", self.collect_interval_s),
            )
            if not value > 0
        ]
        faults += [
            f"{name} is {value}; it must not be negative."
            for name, value in (("garbage_grace_s", self.garbage_grace_s), ("delete_grace_s", self.delete_grace_s))
            if value < 0
        ]
        if faults:
            raise SettingsError(faults)
