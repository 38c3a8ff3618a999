"""The layer of a Python environment: what of it belongs into an image, and its bytecode."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from services.builder.bytecode import Bytecode, Compiler
from services.builder.image_environments import MARKER, ImageEnvironment
from services.builder.images import VENV
from services.builder.layers import Entry, entries_of

_NOT_IN_IMAGE = (
    *(".lock", ".gitignore", "CACHEDIR.TAG", MARKER, "pyvenv.cfg"),
    *("bin/activate.bat", "bin/activate.csh", "bin/activate.fish", "bin/activate.nu", "bin/activate.ps1"),
    *("bin/activate.xsh", "bin/activate_this.py", "bin/deactivate.bat", "bin/pydoc.bat"),
)
"""By path: packages may have files of the same names."""
_OF_THE_MACHINE = ("direct_url.json", "uv_cache.json", "uv_build.json")
"""In a package's dist-info: where and when this machine got it, credentials perhaps."""
_PYTHON_FOLDER = re.compile(r"^((?:lib|include/site)/)python3\.\d+(?=/|$)")
_PYTHON_LINK = re.compile(r"bin/python(?:3(?:\.\d+)?)?")


def key_of(environment: ImageEnvironment, python: str, compiler: Compiler | None) -> str:
    """What a layer depends on; `python` is where the base has its interpreter."""
    return f"environment {environment.digest} {python} {compiler.version if compiler else 'without bytecode'}"


def entries(
    environment: ImageEnvironment, python: str, compiler: Compiler | None, bytecode: Bytecode
) -> Iterator[Entry]:
    """The virtual environment, its interpreter the base's at `python`, its modules compiled for where they will lie.

    Blocks. Raises OSError where modules cannot be compiled.
    """
    root, minor = environment.path, environment.target.minor
    at = VENV.strip("/")
    (site_packages,) = root.glob("lib/python3.*/site-packages")
    for entry in entries_of(root, at, without=_NOT_IN_IMAGE, without_named=("__pycache__",)):
        name = _PYTHON_FOLDER.sub(rf"\g<1>python{minor}", entry.name.removeprefix(at).lstrip("/"))
        last = PurePosixPath(name).name
        if _PYTHON_LINK.fullmatch(name) or (last in _OF_THE_MACHINE and ".dist-info/" in name):
            continue
        data = entry.data
        if last == "RECORD" and entry.path is not None and PurePosixPath(name).parent.suffix == ".dist-info":
            data = _without_machine(entry.path)
        path = None if data is not None else entry.path
        yield Entry(f"{at}/{name}".rstrip("/"), path, data, entry.link, entry.executable, entry.owner)
    for link, target in {"python": python, "python3": "python", f"python{minor}": "python"}.items():
        yield Entry(f"{at}/bin/{link}", link=target)
    yield Entry(f"{at}/pyvenv.cfg", data=_config(environment, python))
    for compiled in bytecode.of(site_packages, compiler) if compiler else ():
        yield Entry(f"{at}/lib/python{minor}/site-packages/{compiled.name}", path=compiled.path)


def _config(environment: ImageEnvironment, python: str) -> bytes:
    lines = {
        "home": str(PurePosixPath(python).parent),
        "implementation": "CPython",
        "version_info": environment.target.python,
        "include-system-site-packages": "false",
        "relocatable": "true",
    }
    return "".join(f"{key} = {value}\n" for key, value in lines.items()).encode()


def _without_machine(record: Path) -> bytes:
    """RECORD without the files that are left out."""
    with open(record, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and PurePosixPath(row[0]).name not in _OF_THE_MACHINE]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
