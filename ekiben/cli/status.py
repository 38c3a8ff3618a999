"""`ekiben status`: whether the server is ready, and which part of it is not."""

import json
from http.client import NOT_FOUND, HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import click

from ekiben.cli.options import hidden_connection_options, output_option
from ekiben.cli.output import coloured, dump
from ekiben.cli.session import take_options
from ekiben.client import where
from ekiben.endpoints import Endpoint
from ekiben.errors import FailedPrecondition, Unavailable

_WAIT_S = 10.0


@click.command()
@output_option
@hidden_connection_options()
@click.pass_context
def status(ctx: click.Context, /, output: str, **arguments: Any) -> int:
    """Ask the server whether each part of it is ready. Exit code 1 where it is not."""
    options = take_options(ctx, arguments)
    found = where(options.get("endpoint"), options.get("token"), context=str(options.get("context") or ""))
    options["connected_to"] = found.endpoint
    code, body = _get(Endpoint.parse(found.endpoint).url + "/readyz")
    ready = code == 200
    answer = _parsed(body)
    if (ready and "ready" not in answer) or code == NOT_FOUND:
        raise FailedPrecondition(
            f"{found.endpoint} is no Ekiben, though something answers there. Name the address that `ekiben up` prints, "
            "not that of a deployment.",
            reason="NO_EKIBEN",
        )
    if output in ("json", "yaml"):
        click.echo(dump({"endpoint": found.endpoint, "ready": ready, **answer}, output))
    else:
        click.echo(f"{found.endpoint}  {coloured('READY' if ready else 'UNREADY')}")
        for key, value in answer.items():
            if key in ("detail", "title") or isinstance(value, dict | list):
                _explain(key, value)
    return 0 if ready else 1


def _explain(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, state in value.items():
            click.echo(f"  {name}: {state}")
    elif isinstance(value, list):
        for item in value:
            click.echo(f"  {item}")
    elif key == "detail":
        click.echo(f"  {value}")


def _get(url: str) -> tuple[int, bytes]:
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_WAIT_S)
    try:
        connection.request("GET", parts.path, headers={"Accept": "application/json"})
        response = connection.getresponse()
        return response.status, response.read(1 << 16)
    except (OSError, HTTPException) as error:
        raise Unavailable(f"failed to connect: {error}", reason="SERVER_UNREACHABLE") from error
    finally:
        connection.close()


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError:
        text = body.decode("utf-8", "replace").strip()
        return {"detail": text} if text else {}
    return data if isinstance(data, dict) else {}
