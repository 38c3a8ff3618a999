"""What is said of folders that cannot be used."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from services.kernel.endings import NotStarted
from services.kernel.settings import SettingsError
from services.operations.__main__ import _told
from services.operations.vaults.folder import open_folder
from services.standalone.lock import locked, unusable
from services.standalone.settings import Settings, expand


def test_a_vault_where_nothing_can_be_made_is_told_in_a_sentence() -> None:
    with pytest.raises(NotStarted, match=r"/proc/nowhere.*: No such file or directory\. Name a place"):
        with _told(), open_folder(Path("/proc/nowhere/vault"), may_make=True):
            pass


def test_a_disk_that_fills_up_under_a_group_of_tasks_is_too() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/mnt/vault/blobs/x")
    with pytest.raises(NotStarted, match="/mnt/vault/blobs/x: No space left on device"):
        with _told():
            raise ExceptionGroup("tasks", [ExceptionGroup("more", [full])])
    with pytest.raises(ExceptionGroup):
        with _told():
            raise ExceptionGroup("tasks", [ValueError("a bug")])


def test_a_data_directory_on_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    told = str(unusable(tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert "No space left on device. Name another with --data, or make room there." in told
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(SettingsError, match="cannot be used"), locked(tmp_path):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_data_directory_of_somebody_else_is_told_with_whose_it_is() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as data:  # short enough for the sockets to be inside
        run = Path(data) / "run"
        run.mkdir()
        os.chown(run, 1, 1)
        with pytest.raises(SettingsError, match=r"is daemon's\. Start it as that user"):
            expand(Settings(data=Path(data), port=7400), {})
