"""Opens the five services and serves them; says where they are once they are ready."""

import asyncio
import contextlib
import json
import os
import shlex
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from services.builder.app import open_builder
from services.deployer.app import open_deployer
from services.gateway.app import open_gateway
from services.kernel.app import serve
from services.kernel.peers import open_peers
from services.recorder.app import open_recorder
from services.registry.app import open_registry
from services.standalone import reserve
from services.standalone.lock import locked, unusable
from services.standalone.settings import Settings, Suite, expand

READY = """
Ekiben is ready at {url}

  log in   bentoml cloud login --endpoint {url} --api-token {token}{also}
  data     {data}
"""

# How long a start may take before it says what it waits for.
_PATIENCE_S = 15.0
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; at the end everything that was started is stopped, replicas too.

    Raises:
        SettingsError: the data directory is in use, a setting is wrong, or the port is taken.
    """
    os.umask(0o077)  # as `serve` does, but before the first folder is made
    with locked(settings.data):
        reserve.release(settings.data)
        try:
            suite = expand(settings)
        except OSError as exc:
            raise unusable(settings.data, exc) from exc
        stop = asyncio.Event()

        async def started() -> None:
            await _announce(settings, suite, stop)
            await reserve.keep(settings.data, stop)

        async with open_peers(suite.peers, caller="standalone") as peers:
            await serve(
                [
                    open_registry(suite.registry),
                    open_recorder(suite.recorder, peers),
                    open_builder(suite.builder, peers),
                    open_deployer(suite.deployer, peers),
                    open_gateway(suite.gateway, peers),
                ],
                suite.server,
                name="ekiben",
                peers=peers,
                started=started,
                stop=stop,
            )


async def _announce(settings: Settings, suite: Suite, stop: asyncio.Event) -> None:
    """Print where it is once the public port says that every part is ready."""
    url = suite.deployer.public_url
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(suite.gateway.host, suite.gateway.host)
    # Not the public URL: that may be a proxy's, which this machine need not reach.
    here = f"http://[{host}]:{suite.gateway.port}" if ":" in host else f"http://{host}:{suite.gateway.port}"

    def missing() -> str:
        """What is not ready yet; empty when all of it is."""
        try:
            with direct.open(f"{here}/readyz", timeout=2):
                return ""
        except urllib.error.HTTPError as exc:
            with contextlib.suppress(ValueError, OSError):
                parts = json.load(exc)["components"]
                return "; ".join(f"{name}: {state}" for name, state in parts.items() if state != "ready")
            return f"{here} answers {exc.code}"
        except OSError as exc:
            return f"{here} does not answer: {getattr(exc, 'reason', exc)}"

    # Whatever http_proxy says, nobody else leads to a port of this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    loop = asyncio.get_running_loop()
    told = loop.time()
    while not stop.is_set():
        why = await asyncio.to_thread(missing)
        if not why:
            token = _token(suite.registry.admin_token_file)
            also = _also(url, suite.registry.admin_token_file)
            print(READY.format(url=url, token=token, also=also, data=settings.data), flush=True)
            return
        if loop.time() - told > _PATIENCE_S:
            told = loop.time()
            print(f"Not ready yet. {why}", file=sys.stderr, flush=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)


def _token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The admin's token for a person at a terminal; for a log, which others keep and read, how to get it."""
    if file is None:
        return "…"
    if sys.stdout.isatty():
        return file.read_text().strip()
    read = f"cat {shlex.quote(str(file))}"
    if environment.get("KUBERNETES_SERVICE_HOST"):  # Who reads a pod's log is elsewhere. Its host name is its own.
        read = f"kubectl exec {_namespace()}{socket.gethostname()} -- {read}"
    return f'"$({read})"'


def _also(url: str, file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """How the `ekiben` command logs in, where it may read the token's file."""
    if file is None or environment.get("KUBERNETES_SERVICE_HOST"):
        return ""
    return f"\n           ekiben login {url} --token-file {shlex.quote(str(file))}"


def _namespace() -> str:
    """The option that says where the pod is; empty where it is not told."""
    try:
        return f"-n {_NAMESPACE.read_text().strip()} "
    except OSError:
        return ""
