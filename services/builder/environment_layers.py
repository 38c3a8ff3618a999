"""The layer of a Python environment: what of it belongs into an image, and its bytecode."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from services.builder.images import VENV
from services.builder.layers import Entry, entries_of
from services.content.files import make_folder

_NOT_IN_IMAGE = ("__pycache__", ".lock", ".gitignore", "complete.json", "lock.txt")


class EnvironmentLayers:
    """What the layers of environments hold. Bytecode is remembered below `cache`."""

    def __init__(self, cache: Path) -> None:
        self._bytecode = cache / "bytecode"

    def entries(self, environment: Path, digest: str, python: str) -> Iterator[Entry]:
        """The virtual environment, its interpreter the base's at `python`, its modules compiled for where they will
        lie. Blocks."""
        compiled = self._compile(environment, digest)
        for entry in entries_of(environment, VENV.strip("/"), without=_NOT_IN_IMAGE):
            name = entry.name.removeprefix(f"{VENV.strip('/')}/")
            if name == "pyvenv.cfg":
                yield Entry(entry.name, data=_at_home(environment / name, python).encode())
            elif name == "bin/python":
                yield Entry(entry.name, link=python)
            else:
                yield entry
        for path in sorted(compiled.rglob("*.pyc")):
            inside = path.relative_to(compiled)
            yield Entry(f"{VENV.strip('/')}/{inside.parent.as_posix()}/__pycache__/{path.name}", path=path)

    def _compile(self, environment: Path, digest: str) -> Path:
        """Bytecode that is never compared with its source: without times, the same wherever it is made."""
        found = self._bytecode / digest.removeprefix("sha256:")
        if not found.is_dir():
            make_folder(self._bytecode)
            fresh = self._bytecode / f".{os.getpid()}"
            python = [str(environment / "bin" / "python"), "-I", "-X", f"pycache_prefix={fresh}"]
            options = [
                "-q",
                "-j",
                "0",
                "--invalidation-mode",
                "unchecked-hash",
                "-s",
                str(environment),
                "-p",
                VENV,
            ]
            # Some packages hold files that are no Python of this version: those are left as sources.
            subprocess.run(
                [*python, "-m", "compileall", *options, str(environment / "lib")],
                check=False,
                capture_output=True,
            )
            (fresh / str(environment).lstrip("/")).rename(found)
        return found


def _at_home(config: Path, python: str) -> str:
    lines = config.read_text().splitlines()
    kept = [
        f"home = {PurePosixPath(python).parent}" if line.split("=")[0].strip() == "home" else line for line in lines
    ]
    return "\n".join(line for line in kept if not line.startswith(("uv =", "prompt ="))) + "\n"
