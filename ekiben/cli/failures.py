"""What is said when a command fails: one line saying what, and what to do next."""

import traceback
from collections.abc import Mapping

import click

from ekiben import errors

_REFUSED = ("failed to connect", "connection refused", "no such file", "name resolution", "dns", "connection reset")


def report(error: Exception, options: Mapping[str, object]) -> int:
    """Print an error to stderr and return the exit code; with `--debug` its traceback too."""
    if options.get("debug"):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
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
        case errors.EkibenError():
            return said, ""
        case OSError():
            named = f"{error.filename}: " if error.filename else ""
            return f"{named}{error.strerror or said}", ""
        case _:
            return f"{type(error).__name__}: {said}", "This is a bug; --debug shows where."
