"""`ekiben completion` and `ekiben version`."""

import sys
from importlib.metadata import version as installed

import click
from click.shell_completion import get_completion_class

from ekiben.cli.output import table

_WHERE = {
    "bash": 'add to ~/.bashrc:  eval "$(ekiben completion bash)"',
    "zsh": 'add to ~/.zshrc:  eval "$(ekiben completion zsh)"',
    "fish": "save as ~/.config/fish/completions/ekiben.fish:  ekiben completion fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_WHERE)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of your SHELL.

    \b
    bash:  eval "$(ekiben completion bash)"     in ~/.bashrc
    zsh:   eval "$(ekiben completion zsh)"      in ~/.zshrc
    fish:  ekiben completion fish > ~/.config/fish/completions/ekiben.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(context.find_root().command, {}, "ekiben", "_EKIBEN_COMPLETE").source())
    if sys.stdout.isatty():
        click.echo(f"# {_WHERE[shell]}", err=True)


@click.command()
def version() -> None:
    """Print the versions of this command, of Python and of gRPC."""
    rows = [["ekiben", installed("ekiben")], ["python", sys.version.split()[0]], ["grpcio", installed("grpcio")]]
    table(["PACKAGE", "VERSION"], rows)
