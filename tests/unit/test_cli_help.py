"""The help of the command, its speed, and that every command has some."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import ekiben
from ekiben.cli import root

ROOT = Path(__file__).resolve().parents[2]

HELP = """\
Usage: ekiben [OPTIONS] COMMAND [ARGS]...

  Ekiben stores your BentoML models and bentos, builds and runs them, routes
  traffic to them, and remembers every prediction.

Options:
  --endpoint URL  The server: http(s)://HOST:PORT.
  --token TOKEN   API token to use.
  --context NAME  A context of `ekiben login`.
  --trace         Print the trace id at the end.
  --debug         Print a traceback when something fails.
  --version       Show the version and exit.
  -h, --help      Show this message and exit.

Start:
  up              Start the whole suite on this machine.
  login           Keep an endpoint and a token for later commands.
  logout          Forget the token of a context.
  contexts        Endpoints that you logged in to: list, use, delete.
  status          Whether the server and each part of it is ready.

Store:
  models          Models: list, get, push, pull, update, delete.
  bentos          Bentos: list, get, push, pull, update, delete.
  aliases         Names such as production that move: set, get, history.
  repositories    The names under which models and bentos are kept.

Build and run:
  builds          Builds of bentos: create, follow, logs, cancel.
  images          OCI images of bentos: list, get, delete; build locally.
  deployments     Running bentos: create, update, scale, roll back, logs.
  clusters        Where replicas run.
  instance-types  Sizes that a service may ask for.

See:
  predictions     What was asked and answered: list, show, tail.
  lineage         What a model, bento or deployment uses, and what uses it.
  traces          What each hop of a request did, as a waterfall.
  audit           Who did what, and what was refused.

Manage:
  users           Users and their roles.
  tokens          API tokens.
  quotas          What the organization may keep, and keeps.
  secrets         Values that replicas and builds get.
  admin           The installation as a whole: backup, restore, check.

Other:
  completion      Print the completion script of your shell.
  version         Print the versions of this command and what it runs on.

Examples:
  ekiben up                             start everything on this machine
  ekiben login                          keep that server and its admin token
  ekiben bentos push summarizer         upload from the local BentoML store
  ekiben deployments create summarizer  build it, run it, wait until it answers
  ekiben predictions tail               see what is asked and answered
  ekiben models list -o json            for programs

`ekiben COMMAND --help` says more; docs/cli.md says all.
"""


def run(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **env},
    )


def test_help_is_as_it_was_approved_and_fits_eighty_columns() -> None:
    assert max(map(len, HELP.splitlines())) <= 80
    assert run("-m", "ekiben.cli", "--help").stdout == HELP


def test_help_loads_neither_grpc_nor_rich() -> None:
    code = (
        "import sys\nfrom ekiben.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('grpc', 'google.protobuf', 'rich', 'yaml', 'asyncio') if name in sys.modules])"
    )
    assert run("-c", code).stdout.splitlines()[-1] == "[]"


def test_help_costs_little() -> None:
    """In CPU time, which other tests on the machine hardly change: 100 ms when idle, most of it Python's own start."""
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("-m", "ekiben.cli", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(took) < 0.25


def commands(command: click.Command, path: tuple[str, ...], parent: click.Context | None) -> list[tuple[str, ...]]:
    context = click.Context(command, info_name=path[-1] if path else "ekiben", parent=parent)
    if not isinstance(command, click.Group):
        return [path]
    found = [path]
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += commands(child, (*path, name), context)
    return found


def test_every_command_and_option_has_help() -> None:
    context = click.Context(root, info_name="ekiben")
    for path in commands(root, (), None):
        command: click.Command = root
        for name in path:
            assert isinstance(command, click.Group)
            found = command.get_command(context, name)
            assert found is not None
            command = found
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden and parameter.name != "help":
                assert parameter.help, (path, parameter.name)


@pytest.mark.parametrize(
    ("word", "near"),
    [("modls", "ekiben models"), ("deploy", "ekiben deployments")],
)
def test_a_mistyped_command_names_what_was_perhaps_meant(word: str, near: str) -> None:
    ran = run("-m", "ekiben.cli", word)
    assert ran.returncode == 2 and near in ran.stderr


def test_singular_forms_and_completion_work() -> None:
    assert "iris:v1" in run("-m", "ekiben.cli", "model", "--help").stdout
    assert "KIND is models" in run("-m", "ekiben.cli", "repository", "--help").stdout
    for shell in ("bash", "zsh", "fish"):
        assert "_EKIBEN_COMPLETE" in run("-m", "ekiben.cli", "completion", shell).stdout
    completed = run("-m", "ekiben.cli", _EKIBEN_COMPLETE="bash_complete", COMP_WORDS="ekiben dep", COMP_CWORD="1")
    assert completed.stdout == "plain,deployments\n"


def test_the_promised_names_are_there() -> None:
    for name in ekiben.__all__:
        assert getattr(ekiben, name).__module__.startswith("ekiben.")
    with pytest.raises(AttributeError):
        ekiben.nonsense  # noqa: B018


@pytest.mark.parametrize("words", [["help", "models", "list"], ["models", "list", "-h"], ["model", "ls", "--help"]])
def test_help_is_asked_for_in_whatever_way(words: list[str]) -> None:
    answer = CliRunner().invoke(root, words)
    assert answer.exit_code == 0 and "List models, newest first" in answer.output


def test_help_of_nothing_is_that_of_all_and_of_what_is_not_there_an_error() -> None:
    assert CliRunner().invoke(root, ["help"]).output == CliRunner().invoke(root, ["--help"]).output
    answer = CliRunner().invoke(root, ["help", "nonsuch"])
    assert answer.exit_code == 2 and "There is no command 'nonsuch'." in answer.output
