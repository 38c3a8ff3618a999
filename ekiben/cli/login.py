"""`ekiben login`, `logout`, `contexts`: which server, with which token."""

import asyncio
import sys
import webbrowser
from pathlib import Path

import click

from ekiben import contexts as kept
from ekiben.api.v1 import annotations_pb2
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import confirm, output_option, yes_option
from ekiben.cli.output import dump, last, said, table
from ekiben.cli.progress import Steps
from ekiben.cli.session import finish, new_traceparent
from ekiben.cli.up import default_data
from ekiben.client import Client, where
from ekiben.endpoints import Endpoint
from ekiben.errors import FailedPrecondition, InvalidArgument

_POLL_S = 1.0
_LOGIN_S = 600.0  # the server's code lives for ten minutes


@click.command()
@click.argument("endpoint", required=False)
@click.option("--token", help="API token (ekb_…). A dash reads it from stdin.")
@click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File that holds the token.")
@click.option("--browser", is_flag=True, help="Log in through the browser even where a token is at hand.")
@click.option("--context", "name", default="", help="What to call it; `default` when left out.")
@click.option("--debug", is_flag=True, hidden=True)
@click.pass_context
def login(
    ctx: click.Context,
    endpoint: str | None,
    token: str | None,
    token_file: Path | None,
    browser: bool,
    name: str,
    debug: bool,
) -> None:
    """Keep an ENDPOINT and a token for later commands.

    Without a token: on the machine where `ekiben up` runs its admin token is taken, elsewhere a page opens in the
    browser where somebody who is logged in approves this command.
    """
    options = ctx.ensure_object(dict)
    options["debug"] = debug or options.get("debug")
    found = where(endpoint or options.get("endpoint"), "", context="")
    name = name or str(options.get("context") or "default")
    options["connected_to"] = found.endpoint
    given = _given(token or options.get("token"), token_file, Endpoint.parse(found.endpoint), browser)
    finish(_login(found.endpoint, given, name), options)


def _given(token: str | None, file: Path | None, endpoint: Endpoint, browser: bool) -> str:
    """The token that is at hand, or nothing: then the browser must give one."""
    if token == "-":
        return sys.stdin.readline().strip()
    if token:
        return token
    if file is not None:
        return file.read_text(encoding="utf-8").strip()
    admin = default_data() / "admin-token"
    if not browser and endpoint.loopback and admin.is_file():
        said(f"Using the admin token in {admin}.")
        return admin.read_text(encoding="utf-8").strip()
    return ""


async def _login(endpoint: str, token: str, name: str) -> None:
    metadata = [("traceparent", new_traceparent())]
    if not token:
        async with Client(endpoint, metadata=metadata) as client:
            token = await _through_browser(client, endpoint)
    async with Client(endpoint, token, metadata=metadata) as client:
        caller = await client.users.caller()
    file = kept.save(kept.load().with_context(name, kept.Context(endpoint, token)))
    role = annotations_pb2.Role.Name(caller.role).removeprefix("ROLE_").lower()
    said(f"Logged in to {endpoint} as {last(caller.user)} ({role}); kept as context {name!r} in {file}.")


async def _through_browser(client: Client, endpoint: str) -> str:
    """Open the approval page and wait for the token that it gives.

    Raises:
        FailedPrecondition: nobody is there to open a page, or nobody approved in time (LOGIN_EXPIRED).
    """
    if not sys.stderr.isatty():
        raise FailedPrecondition(
            "No token was given, and there is no terminal for the browser login. Give --token or --token-file; where "
            "`ekiben up` runs that is DATA/admin-token, DATA being the folder that it prints.",
            reason="TOKEN_REQUIRED",
        )
    opened = await client.users.create_login()
    page = f"{Endpoint.parse(endpoint).url}/api_tokens?code={opened.code}"
    said(f"Approve this login at {page}")
    await asyncio.to_thread(webbrowser.open, page)
    with Steps() as steps:
        steps.now("Waiting for approval in the browser (Ctrl-C to give up)")
        try:
            async with asyncio.timeout(_LOGIN_S):
                while True:
                    try:
                        return (await client.users.redeem_login(opened.code)).token
                    except FailedPrecondition as error:
                        if error.reason != "LOGIN_PENDING":
                            raise
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise FailedPrecondition(
                "Nobody approved the login in ten minutes. Run `ekiben login` again.", reason="LOGIN_EXPIRED"
            ) from None


@click.command()
@click.argument("name", required=False)
@click.pass_context
def logout(ctx: click.Context, name: str | None) -> None:
    """Forget the token of a context NAME, or of the current one. The token itself stays valid."""
    contexts_now = kept.load()
    name = name or str(ctx.ensure_object(dict).get("context") or contexts_now.current)
    found = contexts_now.get(name) if name else None
    if found is None:
        said("Not logged in.")
        return
    changed = {**contexts_now.contexts, name: kept.Context(found.endpoint)}
    kept.save(kept.Contexts(contexts_now.current, changed))
    said(f"Forgot the token of context {name!r} ({found.endpoint}).")


@click.group(cls=NounGroup)
def contexts() -> None:
    """Contexts: the endpoints that you logged in to."""


@contexts.command("list")
@output_option
def list_contexts(output: str) -> None:
    """List contexts; tokens are not shown."""
    found = kept.load()
    rows = [
        {"name": name, "endpoint": item.endpoint, "loggedIn": bool(item.token), "current": name == found.current}
        for name, item in sorted(found.contexts.items())
    ]
    if output in ("json", "yaml"):
        click.echo(dump(rows, output))
    elif output == "name":
        for row in rows:
            click.echo(row["name"])
    else:
        cells = [
            ["*" if row["current"] else "", str(row["name"]), str(row["endpoint"]), "yes" if row["loggedIn"] else "no"]
            for row in rows
        ]
        table(["CURRENT", "CONTEXT", "ENDPOINT", "LOGGED IN"], cells)


@contexts.command("use")
@click.argument("name")
def use_context(name: str) -> None:
    """Make a context the current one."""
    found = kept.load()
    chosen = found.get(name)
    if chosen is None:
        raise InvalidArgument("Say which context.", reason="CONTEXT_REQUIRED")
    kept.save(kept.Contexts(name, found.contexts))
    said(f"Using context {name!r} ({chosen.endpoint}).")


@contexts.command("delete")
@click.argument("name")
@yes_option
def delete_context(name: str, yes: bool) -> None:
    """Forget a context and its token."""
    found = kept.load()
    changed = found.without(name)
    confirm(f"Forget context {name!r}?", yes)
    kept.save(changed)
    said(f"Forgot context {name!r}.")
