"""How registries are spoken to: files of logins and certificates, hosts that may be insecure, patience.

Everything is where docker, podman and skopeo have it, so that a machine on which those work needs nothing more.
"""

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ekiben.errors import FailedPrecondition


@dataclass(frozen=True)
class RegistryOptions:
    """What a store of a registry may be told."""

    login_files: tuple[Path, ...] = ()
    """Files like docker's `config.json`; the first that knows a host counts."""
    certificates: tuple[Path, ...] = ()
    """Folders with a folder for each host: `*.crt` are authorities to trust too, `X.cert` and `X.key` are shown."""
    insecure: frozenset[str] = field(default_factory=frozenset)
    """Hosts (with port) whose certificate is not checked, and to whom plain HTTP is spoken if they do not speak TLS."""
    parallel: int = 4
    """Blobs that are sent at a time."""
    attempts: int = 6
    """How often something is tried that makes no progress."""
    backoff_s: float = 0.5
    """Longest wait before the second try; it doubles up to twenty seconds."""
    stall_s: float = 60.0
    """Longest time without a byte."""
    answer_s: float = 600.0
    """Longest time for the answer to a blob that was sent: a registry may have to copy it then."""
    whole_s: float = 120.0
    """Longest time for all of an answer that is no blob, however steadily it comes."""
    say: Callable[[str], None] = lambda text: None
    """Takes lines for people: what is waited for, where that takes seconds."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "RegistryOptions":
        """As this process is told: REGISTRY_AUTH_FILE, DOCKER_CONFIG, EKIBEN_REGISTRY_CERTIFICATES (a folder),
        EKIBEN_REGISTRY_INSECURE (hosts, separated by commas), and the usual places below them."""
        home = Path(environment.get("HOME") or "~").expanduser()
        config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
        if only := environment.get("REGISTRY_AUTH_FILE"):
            logins = [Path(only)]
        else:
            runtime = environment.get("XDG_RUNTIME_DIR")
            docker = Path(environment.get("DOCKER_CONFIG") or home / ".docker")
            logins = [
                *([docker / "config.json"] if environment.get("DOCKER_CONFIG") else []),
                *([Path(runtime, "containers", "auth.json")] if runtime else []),
                config / "containers" / "auth.json",
                docker / "config.json",
            ]
        folders = [config / "containers" / "certs.d", Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d")]
        if named := environment.get("EKIBEN_REGISTRY_CERTIFICATES"):
            folders.insert(0, Path(named))
        hosts = (each.strip() for each in (environment.get("EKIBEN_REGISTRY_INSECURE") or "").split(","))
        return cls(tuple(logins), tuple(folders), frozenset(each for each in hosts if each))

    def tls(self, host: str) -> ssl.SSLContext:
        """What a connection to a host trusts and shows.

        Raises:
            FailedPrecondition: a certificate that is there cannot be used (REGISTRY_CERTIFICATE_INVALID).
        """
        context = ssl.create_default_context()
        if host in self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        for folder in self.certificates:
            try:
                files = sorted((folder / host).iterdir())
            except OSError:
                continue
            for file in files:
                try:
                    if file.suffix == ".crt":
                        context.load_verify_locations(file)
                    elif file.suffix == ".cert":
                        context.load_cert_chain(file, file.with_suffix(".key"))
                except (OSError, ssl.SSLError) as exc:
                    raise FailedPrecondition(
                        f"The certificate {file} for {host} cannot be used: {exc}. A CA's is PEM in NAME.crt, a "
                        "client's is NAME.cert with its key in NAME.key.",
                        reason="REGISTRY_CERTIFICATE_INVALID",
                        file=str(file),
                        host=host,
                    ) from exc
            break
        return context
