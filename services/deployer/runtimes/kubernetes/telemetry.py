"""Where pods send spans and monitored values: what their container is told. Pure but for the token's file.

The token is in the set's Secret and reaches the container as a variable that may be absent: a token that comes later,
or another one, changes no pod. Pods that start before there is one send nothing.
"""

import contextlib
import ipaddress
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.serving import Telemetry, tracing

TOKEN_KEY = "otlp.token"
"""In the set's Secret."""
TELLING = Path(__file__).with_name("telling.py").read_text(encoding="utf-8")
FOLDER = "/tmp/ekiben"
"""Where a pod keeps what it monitors and cannot send."""


class PodTelemetry:
    """See the module."""

    def __init__(self, endpoint: str = "", token_file: Path | None = None) -> None:
        """`endpoint`: `http://host:port` of the recorder's receiver. One that only this machine reaches is none."""
        self.endpoint = "" if _only_here(endpoint) else endpoint.rstrip("/")
        self._file = token_file
        self._known: tuple[object, str] = (None, "")

    @property
    def token(self) -> str:
        """The token now; empty where there is none. The file is read when it changed."""
        with contextlib.suppress(OSError):
            if self.endpoint and self._file is not None:
                found = self._file.stat()
                state = (found.st_mtime_ns, found.st_ino, found.st_size)
                if self._known[0] != state:
                    self._known = (state, self._file.read_text().strip())
                return self._known[1]
        return ""

    def secret(self) -> dict[str, str]:
        """What the set's Secret holds for it."""
        return {TOKEN_KEY: self.token} if self.token else {}

    def told(self, container: dict[str, Any], spec: SetSpec, secret: str) -> dict[str, Any]:
        """The container, set up to send; unchanged where telemetry is off. `secret`: the name of the set's Secret."""
        if not self.endpoint:
            return container
        telemetry = Telemetry(self.endpoint)
        attributes = {
            "ekiben.deployment": spec.deployment,
            "ekiben.revision": f"{spec.deployment}/revisions/{spec.revision}",
            "ekiben.target": spec.target,
        }
        monitoring = {"endpoint": f"{self.endpoint}/v1/logs", "protocol": "http"}
        told = {
            "service": "" if spec.legacy else spec.service,
            "attributes": ",".join(f"{key}={quote(value, safe='')}" for key, value in attributes.items()),
            "endpoint": self.endpoint,
            "tracing": tracing(telemetry),
            "monitoring": {"enabled": True, "type": "otlp", "options": monitoring},
            "folder": FOLDER,
            **({"config": dict(spec.config)} if spec.legacy else {}),
            **({"calls": [service for service, _ in spec.dependencies]} if spec.dependencies else {}),
        }
        key = {"name": secret, "key": TOKEN_KEY, "optional": True}
        more: list[dict[str, Any]] = [
            {"name": "EKIBEN_TELEMETRY", "value": json.dumps(told, sort_keys=True)},
            {"name": "EKIBEN_REPLICA", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "EKIBEN_OTLP_TOKEN", "valueFrom": {"secretKeyRef": key}},
        ]
        command = ["python", "-c", TELLING, *container["command"]]
        ours = {each["name"] for each in more}
        known = [each for each in container["env"] if each["name"] not in ours]
        return {**container, "command": command, "env": [*known, *more]}


def _only_here(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
