"""What `update` of models, bentos and repositories share: labels, annotations and a description, changed one by one."""

from pathlib import Path
from typing import Any

import click

from ekiben.cli.options import PAIR, F, label_option
from ekiben.cli.output import size, visible

_SHOWN = 100
"""Characters of an annotation's first line that `get` prints; `-o json` has all of it."""


def change_options(function: F) -> F:
    """The options, whose values arrive as keyword arguments for `changed`."""
    for option in reversed(
        (
            label_option,
            click.option("--remove-label", multiple=True, metavar="KEY", help="Remove a label. Repeatable."),
            click.option(
                *("-a", "--annotation", "annotations"),
                type=PAIR,
                multiple=True,
                metavar="KEY=VALUE",
                help="Set an annotation. Repeatable.",
            ),
            click.option(
                *("--annotation-file", "annotation_files"),
                type=PAIR,
                multiple=True,
                metavar="KEY=PATH",
                help="Set an annotation to what a file holds. Repeatable.",
            ),
            click.option("--remove-annotation", multiple=True, metavar="KEY", help="Remove an annotation. Repeatable."),
            click.option("--description", help="Free text; replaces a bento's README."),
        )
    ):
        function = option(function)
    return function


def changed(
    found: Any,
    *,
    labels: tuple[tuple[str, str], ...],
    remove_label: tuple[str, ...],
    annotations: tuple[tuple[str, str], ...],
    annotation_files: tuple[tuple[str, str], ...],
    remove_annotation: tuple[str, ...],
    description: str | None,
) -> tuple[Any, list[str]]:
    """A message of the kind of `found` with what is to change, and the paths of its update mask.

    Raises:
        click.UsageError: nothing is to change, or a file cannot be read as text.
    """
    paths = []
    message = type(found)(name=found.name, etag=found.etag)
    if labels or remove_label:
        paths.append("labels")
        message.labels.update({k: v for k, v in found.labels.items() if k not in remove_label} | dict(labels))
    if annotations or annotation_files or remove_annotation:
        paths.append("annotations")
        message.annotations.update({k: v for k, v in found.annotations.items() if k not in remove_annotation})
        message.annotations.update(dict(annotations))
        message.annotations.update({key: _read(path) for key, path in annotation_files})
    if description is not None:
        paths.append("description")
        message.description = description
    if not paths:
        raise click.UsageError("Nothing to change: give a label, an annotation or --description.")
    return message, paths


def shown(annotations: Any) -> str:
    """Annotations for people: a line each, cut where they are long."""
    lines = []
    for key in sorted(annotations):
        text = annotations[key]
        first = text.partition("\n")[0][:_SHOWN]
        rest = f" … ({size(len(text.encode()))})" if len(first) < len(text) else ""
        lines.append(f"{visible(key)}={visible(first)}{rest}")
    return "\n".join(lines)


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read as text: {error}.") from error
