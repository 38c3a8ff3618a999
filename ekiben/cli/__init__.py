"""The ekiben command: a module for each noun, each loaded only when it is called.

This module holds the map of commands and `main`; `groups` draws the help, `session` connects and runs, `output` prints.
Whatever is imported here is paid for by `ekiben --help`: click, and nothing else.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ekiben.cli.groups import Entry, RootGroup, Section
from ekiben.cli.options import connection_options

SECTIONS = (
    Section(
        "Start",
        Entry("up", "Start the whole suite on this machine."),
        Entry("login", "Keep an endpoint and a token for later commands."),
        Entry("logout", "Forget the token of a context.", module="login"),
        Entry("contexts", "Endpoints that you logged in to: list, use, delete.", module="login"),
        Entry("status", "Whether the server and each part of it is ready."),
    ),
    Section(
        "Store",
        Entry("models", "Models: list, get, push, pull, update, delete."),
        Entry("bentos", "Bentos: list, get, push, pull, update, delete."),
        Entry("aliases", "Names such as production that move: set, get, history."),
        Entry("repositories", "The names under which models and bentos are kept."),
    ),
    Section(
        "Build and run",
        Entry("builds", "Builds of bentos: create, follow, logs, cancel."),
        Entry("images", "OCI images of bentos: list, get, delete; build locally."),
        Entry("deployments", "Running bentos: create, update, scale, roll back, logs."),
        Entry("clusters", "Where replicas run."),
        Entry("instance-types", "Sizes that a service may ask for.", module="clusters"),
    ),
    Section(
        "See",
        Entry("predictions", "What was asked and answered: list, show, tail."),
        Entry("lineage", "What a model, bento or deployment uses, and what uses it."),
        Entry("traces", "What each hop of a request did, as a waterfall."),
        Entry("audit", "Who did what, and what was refused."),
    ),
    Section(
        "Manage",
        Entry("users", "Users and their roles."),
        Entry("tokens", "API tokens."),
        Entry("quotas", "What the organization may keep, and keeps."),
        Entry("secrets", "Values that replicas and builds get."),
        Entry("admin", "The installation as a whole: backup, restore, check."),
    ),
    Section(
        "Other",
        Entry("completion", "Print the completion script of your shell.", module="other"),
        Entry("version", "Print the versions of this command and what it runs on.", module="other"),
    ),
)

EXAMPLES = (
    ("ekiben up", "start everything on this machine"),
    ("ekiben login", "keep that server and its admin token"),
    ("ekiben bentos push summarizer", "upload from the local BentoML store"),
    ("ekiben deployments create summarizer", "build it, run it, wait until it answers"),
    ("ekiben predictions tail", "see what is asked and answered"),
    ("ekiben models list -o json", "for programs"),
)


@click.group(
    cls=RootGroup,
    sections=SECTIONS,
    examples=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@connection_options
@click.version_option(package_name="ekiben", message="ekiben %(version)s")
@click.pass_context
def root(ctx: click.Context, /, **options: object) -> None:
    """Ekiben stores your BentoML models and bentos, builds and runs them, routes traffic to them, and remembers every
    prediction."""
    ctx.ensure_object(dict).update({key: value for key, value in options.items() if value})
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 well, 1 failed, 2 wrong usage, 130 interrupted."""
    options: dict[str, object] = {}
    try:
        code = root.main(
            args=None if arguments is None else list(arguments), prog_name="ekiben", standalone_mode=False, obj=options
        )
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `ekiben … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from ekiben.cli.failures import report

        code = report(error, options)
        try:
            sys.stdout.flush()
        except OSError:  # what is printed to is full: it was told, and the interpreter would tell it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)
