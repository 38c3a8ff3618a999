"""What a uv that was killed leaves is no environment."""

from pathlib import Path
from typing import Any

import pytest

from services.builder.environments import Environments
from services.builder.image_environments import ImageEnvironments
from services.builder.interpreters import Interpreter
from services.builder.locks import Lock, Locks, Work
from services.builder.recipe import Recipe
from services.builder.targets import Target
from services.builder.uv import Outcome, Programs
from services.content.images import Platform


class Killed(Programs):
    """The first uv that installs is killed after a part of a package; for the next it counts as the whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / "run")
        self.found: list[set[str]] = []

    async def uv(self, *arguments: Any, cwd: Path, **_: Any) -> Outcome:
        if arguments[0] == "venv":
            Path(arguments[-1]).mkdir(parents=True)
            return Outcome(0, "")
        made = Path(arguments[arguments.index("--python") + 1]).parent.parent
        self.found.append({path.name for path in made.iterdir()})
        (made / "tabulate.dist-info").mkdir()
        if len(self.found) == 1:
            return Outcome(-9, "killed")
        (made / "tabulate.py").write_text("the whole")
        return Outcome(0, "")


@pytest.mark.parametrize("kind", ["images", "replicas"])
async def test_what_a_killed_install_left_is_not_taken_for_a_package(tmp_path: Path, kind: str) -> None:
    programs, work, recipe = Killed(tmp_path / "data"), Work(tmp_path / "work"), Recipe("3.11", "1.4.39", ())
    work.directory.mkdir()
    locks, made = Locks(tmp_path / "data", programs), work.directory / "made"
    if kind == "images":
        target = Target(Platform("linux", "amd64"), "3.11.2", "glibc 2.36")
        await ImageEnvironments(tmp_path / "data", programs, locks)._install(Lock(""), recipe, target, work, made)
    else:
        python = Interpreter("/usr/bin/python3", "3.11.2", "linux-x86_64-glibc", False, True)
        await Environments(tmp_path / "data", programs, locks)._install(Lock(""), recipe, python, work, made)
    assert programs.found == [set(), set()]
    assert sorted(path.name for path in made.iterdir()) == ["tabulate.dist-info", "tabulate.py"]
