"""The contexts that `ekiben login` keeps: which server, with which token.

The file is `~/.config/ekiben/config.yaml` (`$EKIBEN_CONFIG` names another), readable by its owner only:

    current: default
    contexts:
      default: {endpoint: http://127.0.0.1:7400, token: ekb_…}
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition, NotFound


@dataclass(frozen=True)
class Context:
    """One server and the token it is used with."""

    endpoint: str
    token: str = ""


@dataclass(frozen=True)
class Contexts:
    """All that the file holds."""

    current: str = ""
    contexts: Mapping[str, Context] = field(default_factory=dict)

    def get(self, name: str = "") -> Context | None:
        """The context of that name, or the current one; None where there is no current one.

        Raises:
            NotFound: a name was given and there is no such context (CONTEXT_NOT_FOUND).
        """
        if name and name not in self.contexts:
            known = ", ".join(sorted(self.contexts)) or "none yet"
            raise NotFound(
                f"There is no context {name!r} (known: {known}). `ekiben login --context {name}` makes it.",
                reason="CONTEXT_NOT_FOUND",
                context=name,
            )
        return self.contexts.get(name or self.current)

    def with_context(self, name: str, context: Context) -> "Contexts":
        """These contexts with one more, which becomes the current one."""
        return replace(self, current=name, contexts={**self.contexts, name: context})

    def without(self, name: str) -> "Contexts":
        """These contexts with one less; the current one is none when it was that."""
        self.get(name)
        rest = {key: value for key, value in self.contexts.items() if key != name}
        return replace(self, current=self.current if self.current != name else "", contexts=rest)


def path(env: Mapping[str, str] = os.environ) -> Path:
    """Where the file is."""
    if env.get("EKIBEN_CONFIG"):
        return Path(env["EKIBEN_CONFIG"]).expanduser()
    base = Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else Path("~/.config").expanduser()
    return base / "ekiben" / "config.yaml"


def load(file: Path | None = None) -> Contexts:
    """Read the file; none is no contexts.

    Raises:
        FailedPrecondition: the file cannot be read or is not what `save` writes (CONFIG_INVALID).
    """
    file = file or path()
    if not file.exists():
        return Contexts()
    import yaml  # here, because importing the client must stay light

    try:
        read: Any = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        contexts = {
            str(name): Context(str(item["endpoint"]), str(item.get("token") or ""))
            for name, item in (read.get("contexts") or {}).items()
        }
        return Contexts(str(read.get("current") or ""), contexts)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FailedPrecondition(
            f"{file} cannot be read ({error}). Repair or remove it, then run `ekiben login`.",
            reason="CONFIG_INVALID",
            path=str(file),
        ) from error


def save(contexts: Contexts, file: Path | None = None) -> Path:
    """Write the file whole, mode 0600, by renaming; returns where it is."""
    import yaml

    file = file or path()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = yaml.safe_dump(
        {
            "current": contexts.current,
            "contexts": {
                name: {"endpoint": item.endpoint, "token": item.token} for name, item in contexts.contexts.items()
            },
        },
        sort_keys=False,
    )
    new = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(text)
    new.replace(file)
    return file
