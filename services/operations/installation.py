"""Where everything of an installation is, by the settings that its services read."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from services.kernel import postgres
from services.kernel.settings import DatabaseSettings, SettingsError

SERVICES = ("builder", "recorder", "deployer", "registry")
"""Those that keep rows, in the order in which they are read: who names comes before who is named."""


@dataclass(frozen=True)
class Installation:
    """An installation. A service that has no database here is left alone."""

    databases: Mapping[str, DatabaseSettings]
    """By service, in the order of SERVICES."""
    blobs: str
    """URL of the blob store; empty without the registry."""
    key_file: Path | None
    """The key file of the secrets."""
    data: Path | None
    """The data directory, where there is one."""

    def without(self, *services: str) -> "Installation":
        """The same, but for some services. Raises SettingsError when nothing is left."""
        left = {service: url for service, url in self.databases.items() if service not in services}
        if not left:
            raise SettingsError(["No service is left to work on."])
        return Installation(left, self.blobs if "registry" in left else "", self.key_file, self.data)


def find(data: Path | None, *, may_make: bool = False, env: Mapping[str, str] = os.environ) -> Installation:
    """What `ekiben up --data DIR` has, or services alone by their environment.

    For each setting: the variable of its service (`EKIBEN_REGISTRY_DATABASE_URL`, …), else what `ekiben up` is told
    for all (`EKIBEN_DATABASE_URL`, `EKIBEN_BLOBS_URL`), else the place in the data directory, which `may_make` makes
    when absent.

    Raises:
        SettingsError: nothing says where anything is, or the data directory is another user's.
    """
    there = data is not None and (may_make or (data / "registry").is_dir())
    if there and data is not None and data.is_dir() and (owner := data.stat().st_uid) != os.geteuid():
        # Files that another user leaves here, SQLite's among them, would stop the platform.
        raise SettingsError([f"{data} belongs to the user {_user(owner)}: run this as that user (sudo -u)."])
    databases = {}
    for service in SERVICES:
        prefix = f"EKIBEN_{service.upper()}_DATABASE"
        url = env.get(f"{prefix}_URL", "")
        password = env.get(f"{prefix}_PASSWORD_FILE", "")
        if not url and (shared := env.get("EKIBEN_DATABASE_URL", "")):
            url = postgres.with_schema(shared, service)
            password = password or env.get("EKIBEN_DATABASE_PASSWORD_FILE", "")
        if not url and there and data is not None:
            file = data / service / f"{service}.db"
            # One that is not there is not made by looking.
            url = f"sqlite+aiosqlite:///{quote(str(file))}" if may_make or file.is_file() else ""
        if url:
            databases[service] = DatabaseSettings(
                database_url=url, database_password_file=Path(password) if password else None
            )
    if not databases:
        raise SettingsError(
            [
                f"There is no installation in {data}: name its --data directory, or set EKIBEN_REGISTRY_DATABASE_URL "
                "and the like as its services have them."
            ]
        )
    blobs = env.get("EKIBEN_REGISTRY_BLOBS_URL", "") or env.get("EKIBEN_BLOBS_URL", "")
    if not blobs and there:
        blobs = f"file://{quote(str(data))}/registry/blobs"
    if "registry" in databases and not blobs:
        raise SettingsError(
            ["Nothing says where the registry's blobs are: give --blobs, or EKIBEN_REGISTRY_BLOBS_URL."]
        )
    named = env.get("EKIBEN_REGISTRY_SECRETS_KEY_FILE", "")
    key_file = Path(named) if named else data / "registry" / "secrets.key" if there and data is not None else None
    return Installation(databases, blobs, key_file, data if there else None)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
