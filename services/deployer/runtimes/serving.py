"""How a replica is started: its command, environment and configuration. Pure but for looking at files."""

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ekiben.errors import InvalidArgument
from services.deployer.runtimes import SetSpec

LAUNCHER = Path(__file__).with_name("launcher.py")
WORKER = Path(__file__).with_name("worker.py")
"""Which the launcher looks for beside itself."""
INSIDE = Path(__file__).with_name("inside.py")
USER = 1034
"""User and group of a bento's image."""
BENTO = "/home/bentoml/bento"
"""Where a bento lies in its image."""
PLACEHOLDER_PORT = 3000
"""BentoML wants a port although the launcher opens a Unix socket; nothing listens on it."""


@dataclass(frozen=True)
class Places:
    """Where one replica finds its things."""

    home: Path
    """BENTOML_HOME, of this replica only: its folder of metrics is wiped at each start."""
    user_home: Path
    """HOME, shared by the replicas of a deployment, for caches of downloads."""
    temporary: Path
    """Short: BentoML before 1.2 puts Unix sockets there."""
    bento: Path
    socket: Path
    control: Path
    """Folder of the supervisor's own sockets."""
    monitoring: Path


@dataclass(frozen=True)
class Telemetry:
    """Where replicas send spans and monitored values."""

    endpoint: str = ""
    token_file: Path | None = None
    """Read at each start of a replica: whoever makes it may start later."""

    @property
    def token(self) -> str:
        """The token; empty where there is none."""
        return self.token_file.read_text().strip() if self.token_file and self.token_file.exists() else ""


def command(
    spec: SetSpec, places: Places, sockets: Mapping[str, Path], *, python: str, launcher: Path, drain_s: float
) -> list[str]:
    """The command line. `sockets`: where each service that it calls is reached."""
    launch = [python, str(launcher), str(places.socket), str(places.control)]
    where = ["--host", "127.0.0.1", "--port", str(PLACEHOLDER_PORT)]
    if spec.legacy:
        return [*launch, "serve", str(places.bento), "--production", *where]
    calls = [word for name, path in sockets.items() for word in ("--depends", f"{name}=file://{quote(str(path))}")]
    # It stops a little before the platform cuts it off, so that its last words get into the log.
    grace = ["--timeout-graceful-shutdown", str(max(1, int(drain_s) - 1))]
    return [*launch, "start-http-server", str(places.bento), "--service-name", spec.service, *where, *grace, *calls]


def environment(
    spec: SetSpec,
    places: Places,
    telemetry: Telemetry,
    exports: Collection[str],
    replica: str,
    programs: Mapping[str, str],
) -> dict[str, str]:
    """The whole environment of a replica: nothing of the platform's own is in it.

    Args:
        exports: what the Python environment can send, of `traces` and `monitors`; see `exports_of`.
        programs: where programs are found, which a user may set otherwise.
    """
    exports = exports if telemetry.endpoint else ()
    envs = {
        **programs,
        "HOME": str(places.user_home),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        # A supervisor whose worker died ends, where it would else start new ones for ever.
        "BENTOML_CONTAINERIZED": "true",
        **spec.envs,
        "TMPDIR": str(places.temporary),
        "BENTOML_HOME": str(places.home),
        "BENTO_PATH": str(places.bento),
    }
    attributes = {
        "ekiben.deployment": spec.deployment,
        "ekiben.revision": f"{spec.deployment}/revisions/{spec.revision}",
        "ekiben.replica": replica,
        "ekiben.target": spec.target,
    }
    described = ",".join(f"{key}={quote(value, safe='')}" for key, value in attributes.items())
    envs["OTEL_RESOURCE_ATTRIBUTES"] = ",".join(filter(None, (spec.envs.get("OTEL_RESOURCE_ATTRIBUTES"), described)))
    if exports and "OTEL_EXPORTER_OTLP_HEADERS" not in envs:
        # Not in the configuration: a monitor which is given headers there fails at its first use.
        envs["OTEL_EXPORTER_OTLP_HEADERS"] = f"authorization=Bearer%20{quote(telemetry.token, safe='')}"
    if exports:
        # Spans and monitored values are looked at beside the prediction, which is there after a second; by default they
        # would come up to five seconds later.
        envs.setdefault("OTEL_BSP_SCHEDULE_DELAY", "500")
        envs.setdefault("OTEL_BLRP_SCHEDULE_DELAY", "500")
        # In seconds. What is not taken by then is given up: 10 by default are less than a restart of the recorder can
        # take, and a replica that ends waits as long for a recorder that is away.
        envs.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", "20")
        if spec.legacy:
            # Its monitor takes an endpoint for the base of one, so that the option would give /v1/logs twice.
            envs.setdefault("OTEL_EXPORTER_OTLP_ENDPOINT", telemetry.endpoint)
    if spec.legacy:
        envs.setdefault("BENTOML_CONFIG", str(places.home / "bentoml.yaml"))
    else:
        envs["BENTOML_CONFIG_OVERRIDES"] = json.dumps(
            {"services": {spec.service: service_config(spec, places, telemetry, exports)}}
        )
    return envs


def service_config(spec: SetSpec, places: Places, telemetry: Telemetry, exports: Collection[str]) -> dict[str, Any]:
    """Configuration of one service of BentoML 1.2 and later; what the user overrides wins."""
    config: dict[str, Any] = {
        # Whether the services behind it answer is the platform's to know; the probe would hang with them for a minute.
        "runner_probe": {"enabled": False},
        "monitoring": {"enabled": True, "type": "default", "options": {"log_path": str(places.monitoring)}},
    }
    exports = exports if telemetry.endpoint else ()
    if "traces" in exports:
        config["tracing"] = tracing(telemetry)
    if "monitors" in exports:
        config["monitoring"] = {
            "enabled": True,
            "type": "otlp",
            "options": {"endpoint": f"{telemetry.endpoint}/v1/logs", "protocol": "http"},
        }
    merged = merge(config, spec.config)
    merged["ssl"] = {"enabled": False}  # Inside the machine; the gateway is where TLS ends.
    return merged


def legacy_config(spec: SetSpec, telemetry: Telemetry, exports: Collection[str]) -> dict[str, Any]:
    """Configuration file of BentoML 1.0 and 1.1, as JSON is YAML too."""
    config: dict[str, Any] = {"version": 1}
    exports = exports if telemetry.endpoint else ()
    if "traces" in exports:
        config["tracing"] = tracing(telemetry)
    if "monitors" in exports:
        config["monitoring"] = {"enabled": True, "type": "otlp", "options": {}}
    return merge(config, spec.config)


def tracing(telemetry: Telemetry) -> dict[str, Any]:
    """BentoML's tracing section. All is sampled that the caller sampled."""
    return {
        "exporter_type": "otlp",
        "sample_rate": 1.0,
        "excluded_urls": "readyz,livez,healthz,metrics",
        "otlp": {"protocol": "http", "endpoint": f"{telemetry.endpoint}/v1/traces"},
    }


def exports_of(environment: Path) -> frozenset[str]:
    """What the environment can send over OTLP/HTTP, of `traces` and `monitors`; BentoML fails when told to without.

    The builder tried it and wrote it down. One that did not tell has both where the exporter is there.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        return frozenset(json.loads((environment / "complete.json").read_text())["exports"])
    exporter = "lib/python3*/site-packages/opentelemetry/exporter/otlp/proto/http/trace_exporter"
    return frozenset(("traces", "monitors")) if any(environment.glob(exporter)) else frozenset()


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `over` winning at each leaf."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def write_files(spec: SetSpec, places: Places) -> None:
    """Write the secret files of a replica, each readable by its user only. Blocks.

    A path that is neither below the bento nor below the home is taken below the bento: a process on this machine has no
    file system of its own, and the machine's is not the user's to write to.
    """
    for file in spec.files:
        root, path = places.bento, file.path
        if path.startswith("$BENTO_PATH"):
            path = path.removeprefix("$BENTO_PATH")
        elif path.startswith("~"):
            root, path = places.user_home, path.removeprefix("~")
        target = (root / path.lstrip("/")).resolve()
        if not target.is_relative_to(root.resolve()):
            raise InvalidArgument(f"The secret file {file.path} leads out of its folder.", reason="SECRET_PATH_INVALID")
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.touch(mode=0o600)
        target.write_text(file.value)
