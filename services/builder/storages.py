"""Storages of the engine by buildah: where images lie unpacked, and what an execution that was killed leaves."""

import asyncio
import fcntl
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from services.builder.uv import Outcome, Programs
from services.content.files import make_folder


class Storage:
    """A folder of the engine's, and of one execution at a time."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.folder = folder
        self._programs = programs
        self.work = folder / "work"
        """What an execution writes; secrets too."""

    async def clean(self) -> None:
        """Take away what an execution in this storage left: mounts first, so that nothing below them is touched."""
        if not self.folder.is_dir():
            return
        await asyncio.to_thread(_unmount_below, self.folder)
        try:
            if any((self.folder / "root").glob("*-containers/*/userdata")):
                await self.buildah("rm", "--all")
        finally:
            await asyncio.to_thread(shutil.rmtree, self.work, ignore_errors=True)

    async def buildah(self, *arguments: str, line: Callable[[str], None] | None = None) -> Outcome:
        """Run buildah on this storage, to its end."""
        own = ["--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")]
        make_folder(self.work / "tmp")
        env = {"TMPDIR": str(self.work / "tmp"), "XDG_RUNTIME_DIR": str(self.work / "tmp")}
        return await self._programs.run(["buildah", *own, *arguments], cwd=self.work, env=env, line=line)


def lock(path: Path) -> "IO[bytes] | None":
    """Take a storage by its file, until that is closed; None where somebody has it."""
    file = open(path, "wb")  # noqa: SIM115 - the lock is kept as long as it is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _mounts_below(folder: Path) -> Iterator[str]:
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split()[4])
        if point == str(folder) or point.startswith(f"{folder}/"):
            yield point


def _unmount_below(folder: Path) -> None:
    points: Sequence[str] = sorted(_mounts_below(folder.resolve()), key=len, reverse=True)
    for point in points:
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
