"""What is said when a command fails: one line saying what, and what to do next."""

import errno
import traceback
from collections.abc import Mapping

import click

from ekiben import errors

_REFUSED = ("failed to connect", "connection refused", "no such file", "name resolution", "dns", "connection reset")
_NO_NAME = ("errors resolving", "lookup failed", "name or service not known", "nodename nor servname")
_LISTS = {
    "MODEL_NOT_FOUND": "models list",
    "BENTO_NOT_FOUND": "bentos list",
    "MODEL_REPOSITORY_NOT_FOUND": "repositories list models",
    "BENTO_REPOSITORY_NOT_FOUND": "repositories list bentos",
    "ALIAS_NOT_FOUND": "aliases list",
    "BUILD_NOT_FOUND": "builds list",
    "IMAGE_NOT_FOUND": "images list",
    "DEPLOYMENT_NOT_FOUND": "deployments list",
    "REVISION_NOT_FOUND": "deployments revisions NAME",
    "REPLICA_NOT_FOUND": "deployments replicas NAME",
    "TRACE_NOT_FOUND": "traces list",
    "USER_NOT_FOUND": "users list",
    "API_TOKEN_NOT_FOUND": "tokens list",
    "SECRET_NOT_FOUND": "secrets list",
    "DELETED_VERSION_NOT_FOUND": "models|bentos list --deleted",
}
"""The command that shows what there is, where something of a name is not."""
_CHANGES = {"SECRET_EXISTS": "secrets update", "USER_EXISTS": "users update"}
"""The command that changes what is there already."""


def report(error: Exception, options: Mapping[str, object]) -> int:
    """Print an error to stderr and return the exit code; with `--debug` its traceback too."""
    if options.get("debug"):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    while isinstance(error, ExceptionGroup):  # several that went side by side: the first one ended the others
        error = error.exceptions[0]
    what, hint = explain(error, str(options.get("connected_to") or "the server"))
    click.echo(click.style("Error: ", fg="red", bold=True) + what, err=True)
    if isinstance(error, errors.EkibenError):
        for field, description in error.violations:
            if description not in what:
                click.echo(f"  {field}: {description}", err=True)
    if hint:
        click.echo(hint, err=True)
    return 1


def explain(error: Exception, endpoint: str) -> tuple[str, str]:
    """`(what happened, what to do)`, the second perhaps empty because the first says so already."""
    said = str(error)
    match error:
        case errors.Unavailable() if "WRONG_VERSION_NUMBER" in said:
            return (
                f"{endpoint} answers, but does not speak TLS.",
                f"Perhaps it is http://{endpoint.removeprefix('https://')}; TLS is for the proxy before a server.",
            )
        case errors.Unavailable() if any(word in said.lower() for word in _NO_NAME):
            return (
                f"The host of {endpoint} is not known: no name server has it.",
                "Is it misspelt? Another server is named by --endpoint, EKIBEN_ENDPOINT or `ekiben login`.",
            )
        case errors.EkibenError() if "http2 header with status" in said:
            return (
                f"{endpoint} is no Ekiben, or a proxy before it passes no gRPC on ({said.rpartition(' ')[2]}).",
                "Name the address that `ekiben up` prints, not that of a deployment; a proxy must pass HTTP/2 on.",
            )
        case errors.Unavailable() if "CERTIFICATE_VERIFY_FAILED" in said or "handshak" in said.lower():
            return (
                f"The certificate of {endpoint} is not trusted.",
                "SSL_CERT_FILE=roots.pem names the roots of a server that has its own.",
            )
        case errors.Unavailable() if any(word in said.lower() for word in _REFUSED):
            return (
                f"{endpoint} does not answer.",
                "Is `ekiben up` running? Another server is named by --endpoint, EKIBEN_ENDPOINT or `ekiben login`.",
            )
        case errors.Unauthenticated():
            return said or "No valid token was sent.", f"Run `ekiben login {endpoint}`, or set EKIBEN_API_TOKEN."
        case errors.Aborted() if error.reason == "ETAG_MISMATCH":
            return said, "Somebody changed it meanwhile: run the command again."
        case errors.Internal():
            known = error.request_id and error.request_id not in said
            shown = f" Its log knows more: request id {error.request_id}." if known else ""
            return (said or "The server failed.") + shown, ""
        case errors.NotFound() if "`" not in said and (command := _LISTS.get(error.reason)):
            return said, f"`ekiben {command}` shows which there are."
        case errors.AlreadyExists() if command := _CHANGES.get(error.reason):
            return said, f"`ekiben {command}` changes it."
        case errors.EkibenError():
            return said, ""
        case OSError():
            named = f"{error.filename}: " if error.filename else ""
            full = error.errno == errno.ENOSPC
            return f"{named}{error.strerror or said}", "Make room there, then run the command again." if full else ""
        case _:
            return f"{type(error).__name__}: {said}", "This is a bug; --debug shows where."
