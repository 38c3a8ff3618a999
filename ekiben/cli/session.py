"""One run of a command: whom it speaks to, its trace, and how its coroutine runs."""

import asyncio
import functools
import inspect
import secrets
from collections.abc import Awaitable, Callable, Container, Coroutine
from typing import Any

import click

from ekiben.cli.options import hidden_connection_options
from ekiben.client import Client, where


def new_traceparent() -> str:
    """A W3C `traceparent` of a new, sampled trace that starts here."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def open_client(options: dict[str, Any]) -> Client:
    """A client as the options, the environment and the kept contexts say; each call carries one traceparent."""
    found = where(options.get("endpoint"), options.get("token"), context=str(options.get("context") or ""))
    options["connected_to"] = found.endpoint
    traceparent = options.setdefault("traceparent", new_traceparent())
    return Client(found.endpoint, found.token, metadata=[("traceparent", traceparent)])


def run(function: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """Make a click callback of a coroutine function whose first argument is the client."""

    own = inspect.signature(function).parameters

    @hidden_connection_options(without=own)
    @functools.wraps(function)
    @click.pass_context
    def callback(context: click.Context, /, **arguments: Any) -> Any:
        options = take_options(context, arguments, without=own)

        async def connected() -> Any:
            async with open_client(options) as client:
                return await function(client, **arguments)

        return finish(connected(), options)

    return callback


def take_options(context: click.Context, arguments: dict[str, Any], *, without: Container[str] = ()) -> dict[str, Any]:
    """Move the connection options of a command into those of the run, which the root may have set.

    `without` are those names which the command uses for something of its own.
    """
    options: dict[str, Any] = context.ensure_object(dict)
    for key in ("endpoint", "token", "context", "trace", "debug"):
        if key not in without and (value := arguments.pop(key, None)):
            options[key] = value
    return options


def finish(coroutine: Coroutine[Any, Any, Any], options: dict[str, Any]) -> Any:
    """Run a coroutine to its end; the trace id is printed whether it went well or not."""
    try:
        return asyncio.run(coroutine)
    finally:
        if options.get("trace") and "traceparent" in options:
            trace = options["traceparent"].split("-")[1]
            click.echo(f"trace {trace}   (ekiben traces show {trace})", err=True)
