"""Settings: frozen dataclasses, read once from the environment, every fault told at once.

`load(Settings, "EKIBEN_REGISTRY")` takes the field `database_url` from `EKIBEN_REGISTRY_DATABASE_URL`.
Fields are str, int, float, bool, Path, or a tuple of these (comma-separated), each perhaps `| None`.
A secret is never a value of a setting: it is a file that a field `..._file: Path` names.
"""

import ast
import difflib
import inspect
import logging
import os
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class SettingsError(ValueError):
    """Settings that stop the start; `faults` holds a sentence for each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("These settings are wrong:\n" + "\n".join(f"  {fault}" for fault in faults))


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a process listens and what it reports. Environment: `EKIBEN_SERVER_…`."""

    service_token_file: Path
    """File with the token that the services of the suite share; every service reads the same one."""
    listen: str = "127.0.0.1:0"
    """Where gRPC is served: `host:port` (port 0 takes a free one) or `unix:/path`. Loopback by default: opening
    it to a network is a decision."""
    tls_cert_file: Path | None = None
    """Certificate chain in PEM. With it TCP is served over TLS only; a Unix socket never is."""
    tls_key_file: Path | None = None
    """Private key of the certificate, in PEM."""
    tls_client_ca_file: Path | None = None
    """Roots in PEM that clients' certificates must chain to; with it TLS is mutual."""
    metrics_listen: str = ""
    """Where /metrics, /healthz and /readyz are served over HTTP: `host:port`, `unix:/path`, or empty for nowhere."""
    otlp_endpoint: str = ""
    """gRPC address of the suite's recorder, `host:port` or `unix:/path`; empty exports no spans. The suite's token goes
    with them, so name no other receiver here: the recorder sends on to one (`otlp_forward_endpoint`)."""
    otlp_ca_file: Path | None = None
    """Roots in PEM that the recorder's certificate must chain to; with it `otlp_endpoint` is dialled over TLS, and
    `tls_cert_file` is shown where it asks for one."""
    trace_sample_percent: float = 100.0
    """Share of new traces that are kept, 0 to 100. A caller's own decision in `traceparent` goes first."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    log_format: str = "text"
    """`text` for a person or `json` for a collector."""
    grace_s: float = 10.0
    """Seconds that calls in flight get to finish at shutdown."""

    def __post_init__(self) -> None:
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together: one of them is missing.")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            faults.append("tls_client_ca_file needs tls_cert_file and tls_key_file.")
        if not 0 <= self.trace_sample_percent <= 100:
            faults.append(f"trace_sample_percent is {self.trace_sample_percent}; it must be from 0 to 100.")
        if self.log_format not in ("text", "json"):
            faults.append(f"log_format is {self.log_format!r}; it must be text or json.")
        if self.log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            faults.append(f"log_level is {self.log_level!r}; it must be DEBUG, INFO, WARNING or ERROR.")
        if self.grace_s < 0:
            faults.append(f"grace_s is {self.grace_s}; it must not be negative.")
        if faults:
            raise SettingsError(faults)


@dataclass(frozen=True, kw_only=True)
class DatabaseSettings:
    """Where a service keeps its rows: the first fields of the settings of each service that has any."""

    database_url: str
    """`sqlite:////folder/name.db`, or `postgresql://user@host/name?schema=ekiben_registry` with any parameter of
    libpq's (`sslmode`, `sslrootcert`, `service`, …). Without `schema` the tables are made where the role's search
    path says. A password is better kept in PGPASSFILE or `database_password_file`."""
    database_password_file: Path | None = None
    """File with PostgreSQL's password, read for each connection: a new password needs no restart."""
    database_connections: int = 10
    """Most connections to PostgreSQL that this process opens for this service, besides one that listens and at most
    four for look-ups. All processes together must stay below the server's `max_connections`."""

    def database_faults(self) -> list[str]:
        """What is wrong with these, for the `__post_init__` of the service's settings."""
        if self.database_connections < 2:
            return [f"database_connections is {self.database_connections}; it must be at least 2."]
        return []


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """Where the other services are. Environment: `EKIBEN_PEERS_…`."""

    service_token_file: Path
    """File with the token that the services of the suite share."""
    registry: str = ""
    """gRPC address of the registry, `host:port` or `unix:/path`."""
    builder: str = ""
    """gRPC address of the builder."""
    deployer: str = ""
    """gRPC address of the deployer."""
    recorder: str = ""
    """gRPC address of the recorder."""
    blobs: str = ""
    """The registry's bytes endpoint: `unix:/path` or `http://host:port`."""
    images: str = ""
    """The builder's images for container engines: `unix:/path` or `http://host:port`."""
    tls_ca_file: Path | None = None
    """Roots in PEM that peers' certificates must chain to; with it TCP peers are dialled over TLS."""
    tls_cert_file: Path | None = None
    """Own certificate chain in PEM, shown to peers that ask for one (mutual TLS)."""
    tls_key_file: Path | None = None
    """Private key of that certificate, in PEM."""

    def __post_init__(self) -> None:
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together: one of them is missing.")
        if self.tls_cert_file is not None and self.tls_ca_file is None:
            faults.append("tls_cert_file needs tls_ca_file: without it peers are not dialled over TLS.")
        if faults:
            raise SettingsError(faults)


def load(cls: type[T], prefix: str, env: Mapping[str, str] = os.environ) -> T:
    """Settings of class `cls` from the variables `<prefix>_<FIELD>`.

    An empty variable counts as absent. A variable with the prefix that no field reads is logged and passed
    over: it may be a typing error, but also a setting of another release, or one of those that Kubernetes
    makes for every service (`EKIBEN_REGISTRY_PORT`).

    Raises:
        SettingsError: with every fault found.
    """
    prefix = prefix.rstrip("_") + "_"
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    faults: list[str] = []
    known: set[str] = set()
    for field in fields(cls):  # type: ignore[arg-type]
        variable = prefix + field.name.upper()
        known.add(variable)
        text = env.get(variable, "")
        if text:
            try:
                values[field.name] = _convert(text, hints[field.name])
            except ValueError as exc:
                faults.append(f"{variable}: {exc}")
        elif field.default is MISSING and field.default_factory is MISSING:
            faults.append(f"{variable} is required and not set.")
    for name in sorted(env):
        if name.startswith(prefix) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            meant = f" Did you mean {near[0]}?" if near else " docs/settings.md lists them."
            # In the message, since settings are read before they have said how lines are written.
            log.warning(f"{name} is not a setting, and is passed over.{meant}")
    if not faults:
        try:
            return cls(**values)
        except SettingsError as exc:
            faults = [f"{prefix}: {fault}" for fault in exc.faults]
        except ValueError as exc:
            faults = [f"{prefix}: {exc}"]
    raise SettingsError(faults)


@dataclass(frozen=True)
class Setting:
    """One setting as a reader wants to see it."""

    variable: str
    type: str
    default: str
    text: str


def describe(cls: type[Any], prefix: str) -> list[Setting]:
    """Every setting of `cls` with its variable, type, default and the docstring of its field, for docs."""
    prefix = prefix.rstrip("_") + "_"
    texts: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        texts |= _docstrings(part)
    hints = typing.get_type_hints(cls)
    return [
        Setting(
            prefix + field.name.upper(),
            getattr(hints[field.name], "__name__", str(hints[field.name])),
            "required" if field.default is MISSING and field.default_factory is MISSING else str(field.default),
            texts.get(field.name, ""),
        )
        for field in fields(cls)
    ]


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """The docstring of each field that the class itself declares."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    texts: dict[str, str] = {}
    if isinstance(body, ast.ClassDef):
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                texts[statement.target.id] = " ".join(after.value.value.split())
    return texts


def _convert(text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (UnionType, typing.Union):
        return _convert(text, next(part for part in typing.get_args(hint) if part is not NoneType))
    if origin is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(_convert(part.strip(), kind) for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise ValueError(f"{text!r} is neither true nor false.")
    if hint is int or hint is float:
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a{'n integer' if hint is int else ' number'}.") from None
    if hint is Path:
        return Path(text)
    if hint is str:
        return text
    raise TypeError(f"settings cannot hold a {hint}")
