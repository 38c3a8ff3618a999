"""What the gateway can be told. Environment: `EKIBEN_GATEWAY_…`."""

from dataclasses import dataclass
from pathlib import Path

from services.kernel.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the gateway listens, what it keeps, and where Envoy finds the other services."""

    data_dir: Path
    """Envoy's files, the last route table and the captures that the recorder does not have yet."""
    run_dir: Path
    """Unix sockets of Envoy's admin interface, of the HTTP front and of admission. Its path must be short: a
    socket's path has at most 107 bytes."""
    host: str = "127.0.0.1"
    """Address of the public port and of the deployments' own ports. Loopback: opening it to a network is a decision."""
    port: int = 7400
    """The public port; 0 takes a free one and keeps it over restarts."""
    domain: str = "localhost"
    """Deployments are reached as `NAME-NAMESPACE.DOMAIN`; any other name below it answers 404."""
    api_hosts: tuple[str, ...] = ()
    """Names below `domain` that mean the API all the same, such as `ekiben.example.com`."""
    trusted_hops: int = 0
    """How many proxies before this one may be believed what `x-forwarded-*` says; 0 for none."""

    registry: str = ""
    """Where Envoy reaches the registry's gRPC: `unix:/path` or `host:port`. Empty takes the peers' address."""
    builder: str = ""
    """The builder, see `registry`."""
    deployer: str = ""
    """The deployer, see `registry`."""
    recorder: str = ""
    """The recorder, see `registry`; also where Envoy sends its spans."""
    blobs: str = ""
    """The registry's bytes endpoint: `unix:/path`, `http://host:port` or `https://host:port`."""
    images: str = ""
    """The builder's images for container engines, where `/v2/` leads; see `blobs`. Empty takes the peers' address."""
    tls_ca_file: Path | None = None
    """Roots in PEM for peers over TCP; with it Envoy dials them over TLS. None takes the peers' setting."""
    tls_cert_file: Path | None = None
    """Certificate that Envoy shows to peers, in PEM."""
    tls_key_file: Path | None = None
    """Its private key, in PEM."""
    service_token_file: Path | None = None
    """The suite's token, which Envoy sends with its spans. None takes the peers' setting."""

    upload_strategy: str = "auto"
    """How BentoML's client moves its archives: `presigned` (one PUT), `multipart` (parts of 100 MiB), `proxy` (through
    the HTTP front), or `auto`: one PUT below 100 MiB, parts from there on."""
    http_listen: str = ""
    """Where the HTTP front listens for Envoy; empty for `unix:<run_dir>/http.sock`."""
    envoy_concurrency: int = 0
    """Worker threads of Envoy; 0 for one a core, at most 4: two saturate the replicas of most machines."""
    trace_sample_percent: float = 100.0
    """Share of new traces that are kept, 0 to 100. A caller's own decision in `traceparent` goes first."""
    stream_idle_timeout_s: float = 3600.0
    """How long a request may pass without a byte in either direction; predictions can be slow."""
    drain_grace_s: float = 10.0
    """How long requests get to end at shutdown."""
    orphan_grace_s: float = 30.0
    """How long Envoy serves on when this process vanished, for the next one to adopt it."""

    capture_with: str = "auto"
    """What captures inside Envoy: `module` (compiled, at less than half the cost), `script` (Lua, on any machine), or
    `auto`: the module where it was built."""
    capture_backlog_bytes: int = 1 << 30
    """Most captures that may wait for the recorder on disk; beyond it the oldest are dropped, and counted."""
    capture_segment_bytes: int = 64 << 20
    """The capture log is cut into files of about this size."""
    metrics_targets: tuple[str, ...] = ()
    """`/metrics` of the other services, where they are other processes: `registry=http://host:port/metrics`."""
    replica_metrics_interval_s: float = 5.0
    """Scrapes of replicas are this old at most; so a busy page of metrics does not disturb predictions."""

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.port <= 65535:
            faults.append(f"port is {self.port}; it must be from 0 to 65535.")
        if not 0 <= self.trace_sample_percent <= 100:
            faults.append(f"trace_sample_percent is {self.trace_sample_percent}; it must be from 0 to 100.")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together: one of them is missing.")
        if self.upload_strategy not in ("auto", "presigned", "multipart", "proxy"):
            faults.append(
                f"upload_strategy is {self.upload_strategy!r}; it must be auto, presigned, multipart or proxy."
            )
        if self.capture_with not in ("auto", "module", "script"):
            faults.append(f"capture_with is {self.capture_with!r}; it must be auto, module or script.")
        for field in ("trusted_hops", "envoy_concurrency", "drain_grace_s", "capture_backlog_bytes"):
            if getattr(self, field) < 0:
                faults.append(f"{field} is {getattr(self, field)}; it must not be negative.")
        if faults:
            raise SettingsError(faults)

    @property
    def envoy_dir(self) -> Path:
        """The files that Envoy reads."""
        return self.data_dir / "envoy"

    @property
    def captures_dir(self) -> Path:
        """The capture log."""
        return self.data_dir / "captures"

    @property
    def admin_socket(self) -> Path:
        """Envoy's admin interface."""
        return self.run_dir / "envoy-admin.sock"

    @property
    def admission_socket(self) -> Path:
        """Where Envoy asks whether a request may pass."""
        return self.run_dir / "admission.sock"

    @property
    def http_address(self) -> str:
        """Where the HTTP front listens."""
        return self.http_listen or f"unix:{self.run_dir / 'http.sock'}"
