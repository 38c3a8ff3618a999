"""Work in threads that whoever started it waits for, also when he is cancelled."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from services.builder import bento as bentos
from services.builder import image_environments, locks
from services.builder.image_environments import ImageEnvironments
from services.builder.interpreters import Interpreter
from services.builder.locks import Lock, Locks, Work
from services.builder.recipe import Recipe
from services.builder.targets import Target
from services.builder.uv import Programs
from services.content.images import Platform
from services.content.threads import in_thread

DIGEST = "d" * 64


class Gate:
    """Stands in the way of a thread until it is let."""

    def __init__(self) -> None:
        self.entered, self.let = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.let.wait(60)


async def cancelled_at(gate: Gate, work: "asyncio.Task[object]", then: Callable[[], None] = lambda: None) -> None:
    """Cancel, twice, what a thread works for; its caller goes when it has ended."""
    assert await asyncio.to_thread(gate.entered.wait, 60)
    try:
        for _ in range(2):
            work.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not work.done(), "what the thread works on would be taken away now"
    finally:
        gate.let.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    then()


async def test_what_it_gives_and_raises_is_its_caller_s() -> None:
    assert await in_thread(int, "12", base=8) == 10
    with pytest.raises(ValueError, match="invalid literal"):
        await in_thread(int, "x")


async def test_a_caller_that_is_cancelled_goes_when_the_thread_has_ended() -> None:
    gate = Gate()
    ended: list[bool] = []

    def work() -> None:
        gate()
        ended.append(True)
        raise ValueError("that nobody hears of")

    await cancelled_at(gate, asyncio.create_task(in_thread(work)))
    assert ended == [True]


async def test_what_a_bento_brings_along_is_kept_whole_or_not_at_all_when_its_build_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, directory = Gate(), tmp_path / "work"
    for path in (tmp_path / "bento" / "src" / "package", directory):
        path.mkdir(parents=True)

    def copy_folder(folder: Path, into: Path, bento: Path) -> None:
        into.mkdir()
        (into / "first").write_bytes(b"1")
        gate()
        (into / "second").write_bytes(b"2")

    monkeypatch.setattr(bentos, "copy_folder", copy_folder)
    kept = Locks(tmp_path / "data", Programs(tmp_path / "data", tmp_path / "run"))
    recipe = Recipe("3.11", "1.4.39", (), shipped={"src/package": DIGEST})
    python = Interpreter("/usr/bin/python3", "3.11.2", "linux-x86_64-glibc", False, True)
    making = asyncio.create_task(kept.make(recipe, python, tmp_path / "bento", Work(directory)))
    await cancelled_at(gate, making, lambda: shutil.rmtree(directory))
    there = kept.file(f"shipped:{DIGEST}/package")
    assert sorted(path.name for path in there.iterdir()) == ["first", "second"]


async def test_an_environment_for_images_is_there_whole_when_its_build_is_cancelled_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, directory, finish = Gate(), tmp_path / "work", image_environments._finish

    def slowly(made: Path, path: Path, content: dict[str, str]) -> None:
        gate()
        finish(made, path, content)

    async def installed(self: object, lock: Lock, recipe: object, target: object, work: Work, made: Path) -> None:
        made.mkdir(parents=True)
        (made / "module.py").write_bytes(b"1")

    async def locked(*_: object, **__: object) -> Lock:
        return Lock("bentoml==1.4.39")

    monkeypatch.setattr(image_environments, "_finish", slowly)
    monkeypatch.setattr(ImageEnvironments, "_install", installed)
    monkeypatch.setattr(locks.Locks, "make", locked)
    programs = Programs(tmp_path / "data", tmp_path / "run")
    environments = ImageEnvironments(tmp_path / "data", programs, Locks(tmp_path / "data", programs))
    target = Target(Platform("linux", "amd64"), "3.11.2", "glibc 2.36")
    work = Work(directory)
    making = asyncio.create_task(environments.make(Recipe("3.11", "1.4.39", ()), target, tmp_path / "bento", work))
    await cancelled_at(gate, making, lambda: shutil.rmtree(directory))
    (path,) = (each for each in (tmp_path / "data" / "image-environments").iterdir() if each.is_dir())
    assert sorted(each.name for each in path.iterdir()) == ["complete.json", "module.py"]
