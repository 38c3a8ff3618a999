"""One data directory expands into the settings of five services.

What is worked out here are defaults only: a variable `EKIBEN_<SERVICE>_<FIELD>` of the environment wins, so that every
setting of every service can be had in standalone too.
"""

import contextlib
import hashlib
import os
import pwd
import re
import secrets
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from services.builder.settings import Settings as BuilderSettings
from services.deployer.settings import Settings as DeployerSettings
from services.gateway.settings import Settings as GatewaySettings
from services.kernel import postgres
from services.kernel.settings import PeerSettings, ServerSettings, SettingsError, load
from services.recorder.settings import Settings as RecorderSettings
from services.registry.settings import Settings as RegistrySettings

T = TypeVar("T")

# A Unix socket's path has at most 107 bytes, and the services need some 40 of them for names below the folder.
_LONGEST_RUN_DIR = 60
# To gRPC `unix:PATH` is a URI: these would begin its query or its fragment, or be decoded.
_NOT_IN_ADDRESS = re.compile(r"[?#%]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a person says: where the data is and where to listen."""

    data: Path
    """Folder for everything; made when it is not there. Absolute."""
    host: str = "127.0.0.1"
    """Address of the public port and of the deployments' own ports."""
    port: int = 7400
    """The public port; 0 takes a free one, which later starts keep."""
    database: str = ""
    """URL of a PostgreSQL database for all services, each in a schema of its own (`ekiben_registry`, …; with
    `?schema=x` in it `x_registry`, …). Empty for a SQLite file each, below `data`."""
    database_password_file: Path | None = None
    """File with its password."""
    blobs: str = ""
    """Where blobs are kept, as `EKIBEN_REGISTRY_BLOBS_URL`; empty for a folder below `data`."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The settings of everything that standalone opens."""

    server: ServerSettings
    peers: PeerSettings
    registry: RegistrySettings
    builder: BuilderSettings
    deployer: DeployerSettings
    recorder: RecorderSettings
    gateway: GatewaySettings


def expand(settings: Settings, env: Mapping[str, str] = os.environ) -> Suite:
    """Work out the settings of the suite, and make the folders, the suite's token and the ports that they name.

    Call it with the data directory locked: the second start finds what the first one made.

    Raises:
        SettingsError: variables of the environment are wrong; every fault is told.
    """
    data = settings.data
    databases = {name: _database(settings, name) for name in ("registry", "builder", "deployer", "recorder")}
    run = _run_dir(data)
    in_url = quote(str(data))
    for folder in ("registry/blobs", "builder", "deployer", "recorder", "gateway"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    service_token = data / "service-token"
    _keep(service_token, lambda: "eks_" + secrets.token_urlsafe(32))
    port = settings.port or int(_keep(data / "port", lambda: str(_free_port(settings.host))))
    otlp_port = _otlp_port(data / "otlp-port")
    suite, blobs, images = f"unix:{run}/suite.sock", f"unix:{run}/blobs.sock", f"unix:{run}/images.sock"
    shown_host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    authority = f"[{shown_host}]" if ":" in shown_host else shown_host
    server = {
        "service_token_file": service_token,
        "listen": suite,
        "otlp_endpoint": suite,
        "log_level": "WARNING",
    }
    peers = {
        "service_token_file": service_token,
        **dict.fromkeys(("registry", "builder", "deployer", "recorder"), suite),
        "blobs": blobs,
        "images": images,
    }
    registry = {
        **databases["registry"],
        "blobs_url": settings.blobs or f"file://{in_url}/registry/blobs",
        "blobs_listen": blobs,
        "secrets_key_file": data / "registry" / "secrets.key",
        "admin_token_file": data / "admin-token",
    }
    builder = {
        **databases["builder"],
        "data_dir": data / "builder",
        "run_dir": run / "b",
        "images_listen": images,
    }
    deployer = {
        **databases["deployer"],
        "data_dir": data / "deployer",
        "run_dir": run / "d",
        "host": shown_host,
        "public_url": f"http://{authority}:{port}",
        "otlp_http_endpoint": f"http://127.0.0.1:{otlp_port}",
        "otlp_token_file": data / "otlp-token",
    }
    recorder = {
        **databases["recorder"],
        "otlp_http_listen": f"127.0.0.1:{otlp_port}",
        "otlp_token_file": data / "otlp-token",
    }
    gateway = {
        "data_dir": data / "gateway",
        "run_dir": run / "g",
        "host": settings.host,
        "port": port,
        "service_token_file": service_token,
    }
    faults: list[str] = []

    def take(cls: type[T], prefix: str, defaults: Mapping[str, object]) -> T:
        named = {f"{prefix}_{field.upper()}": str(value) for field, value in defaults.items()}
        try:
            return load(cls, prefix, named | {key: value for key, value in env.items() if key.startswith(f"{prefix}_")})
        except SettingsError as exc:
            faults.extend(exc.faults)
            return None  # type: ignore[return-value]  # `faults` stop the start below

    taken = Suite(
        server=take(ServerSettings, "EKIBEN_SERVER", server),
        peers=take(PeerSettings, "EKIBEN_PEERS", peers),
        registry=take(RegistrySettings, "EKIBEN_REGISTRY", registry),
        builder=take(BuilderSettings, "EKIBEN_BUILDER", builder),
        deployer=take(DeployerSettings, "EKIBEN_DEPLOYER", deployer),
        recorder=take(RecorderSettings, "EKIBEN_RECORDER", recorder),
        gateway=take(GatewaySettings, "EKIBEN_GATEWAY", gateway),
    )
    if faults:
        raise SettingsError(faults)
    return taken


def _database(settings: Settings, service: str) -> dict[str, object]:
    """Where a service keeps its rows."""
    if not settings.database:
        return {"database_url": f"sqlite+aiosqlite:///{quote(str(settings.data))}/{service}/{service}.db"}
    if settings.database.partition("://")[0] not in postgres.SCHEMES:
        raise SettingsError(
            [
                "--database takes the URL of a PostgreSQL database: postgresql://user@host/name. Without it each "
                "service has a SQLite file of its own below --data."
            ]
        )
    found: dict[str, object] = {"database_url": postgres.with_schema(settings.database, service)}
    if settings.database_password_file is not None:
        found["database_password_file"] = settings.database_password_file
    return found


def _run_dir(data: Path) -> Path:
    """A folder for sockets that only this user may enter: in the data directory, or elsewhere where an address cannot
    hold its path."""
    run = data / "run"
    if len(os.fsencode(run)) > _LONGEST_RUN_DIR or _NOT_IN_ADDRESS.search(str(run)):
        digest = hashlib.sha256(os.fsencode(data)).hexdigest()[:12]
        run = Path(tempfile.gettempdir()) / f"ekiben-{os.getuid()}-{digest}"
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    if run.parent == data and run.stat().st_uid != os.getuid():
        with contextlib.suppress(KeyError):
            owner = pwd.getpwuid(run.stat().st_uid).pw_name
            raise SettingsError(
                [f"The data directory {data} is {owner}'s. Start it as that user, or name another with --data."]
            )
    if run.is_symlink() or run.stat().st_uid != os.getuid():
        raise SettingsError(
            [f"The folder {run} belongs to somebody else; remove it, or set TMPDIR to a folder of yours."]
        )
    run.chmod(0o700)
    for name in ("b", "d", "g"):
        (run / name).mkdir(exist_ok=True, mode=0o700)
    # The suite's own sockets are bound anew; a stale one of a killed process would refuse that.
    for stale in ("suite.sock", "blobs.sock", "images.sock"):
        with contextlib.suppress(FileNotFoundError):
            (run / stale).unlink()
    return run


def _keep(file: Path, make: Callable[[], str]) -> str:
    """What `file` holds; made, for this user only, when it is not there or empty."""
    with contextlib.suppress(FileNotFoundError):
        if text := file.read_text().strip():
            return text
    text = make()
    fresh = file.with_name(file.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(file)
    return text


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError as exc:
            raise SettingsError(
                [
                    f"host: cannot listen on {host}: {exc.strerror or exc}. Name an address of this machine: "
                    "127.0.0.1, or 0.0.0.0 for all that it has."
                ]
            ) from exc
        return int(probe.getsockname()[1])


def _otlp_port(file: Path) -> int:
    """The port for replicas' telemetry: kept, since replicas outlive a restart, unless somebody else took it."""
    port = int(_keep(file, lambda: str(_free_port("127.0.0.1"))))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            file.unlink()
            port = int(_keep(file, lambda: str(_free_port("127.0.0.1"))))
    return port
