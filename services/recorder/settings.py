"""What an operator may set of the recorder; read from EKIBEN_RECORDER_… once, at start."""

from dataclasses import dataclass
from pathlib import Path

from services.kernel.settings import DatabaseSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings(DatabaseSettings):
    """Settings of the recorder. Environment: `EKIBEN_RECORDER_…`."""

    otlp_token_file: Path | None = None
    """File with the token that OTLP over HTTP asks for. Made, readable by the owner only, when it is not there.
    Required with `otlp_http_listen`: replicas run code of strangers, and so does whatever else reaches the port."""
    otlp_http_listen: str = ""
    """Where OTLP over HTTP is served, for replicas: `host:port` (port 0 takes a free one) or `unix:/path`; empty for
    nowhere."""
    otlp_forward_endpoint: str = ""
    """Also send all that arrives over OTLP to this endpoint: `http://host:4318` or `https://…` for OTLP over HTTP;
    `host:4317`, `grpc://…`, `grpcs://…` (TLS) or `unix:/path` for gRPC; empty sends nothing."""
    otlp_forward_headers_file: Path | None = None
    """File with headers for that endpoint, a line `name: value` each: an API key, say."""
    retention_days: float = 30.0
    """Predictions, monitor entries and traces older than this are forgotten; 0 keeps them for ever."""
    max_stored_bytes: int = 20 << 30
    """Bytes that the prediction log and the traces may hold together, about; the oldest are forgotten beyond.
    20 GiB by default: about ten million predictions of 1 KiB each way. 0 sets no limit."""
    min_free_bytes: int = 64 << 20
    """SQLite only: with less space than this on its disk (or than a twentieth of the disk, where that is less), what
    would make the database grow is refused, and the rest of the machine keeps running. 0 records until the disk is
    full."""
    organization: str = "default"
    """Owner of the spans and monitor entries that come over OTLP."""

    def __post_init__(self) -> None:
        faults = self.database_faults()
        if self.otlp_http_listen and self.otlp_token_file is None:
            faults.append("otlp_http_listen needs otlp_token_file.")
        if self.retention_days < 0:
            faults.append(f"retention_days is {self.retention_days}; it must not be negative.")
        if self.max_stored_bytes < 0 or self.min_free_bytes < 0:
            faults.append("max_stored_bytes and min_free_bytes must not be negative.")
        if faults:
            raise SettingsError(faults)
