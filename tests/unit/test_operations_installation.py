"""Where an installation is: as `ekiben up` and services alone are told."""

from pathlib import Path

import pytest

from services.kernel.settings import SettingsError
from services.operations.installation import SERVICES, Installation, find


def urls(installation: Installation) -> dict[str, str]:
    return {service: settings.database_url for service, settings in installation.databases.items()}


def made(data: Path) -> Path:
    for service in SERVICES:
        (data / service).mkdir(parents=True)
        (data / service / f"{service}.db").touch()
    return data


def test_the_data_directory_says_where_everything_is(tmp_path: Path) -> None:
    data = made(tmp_path / "a b")
    found = find(data, env={})
    assert urls(found)["registry"] == f"sqlite+aiosqlite:///{tmp_path}/a%20b/registry/registry.db"
    assert list(found.databases) == list(SERVICES) and SERVICES[-1] == "registry"
    assert found.blobs == f"file://{tmp_path}/a%20b/registry/blobs"
    assert found.key_file == data / "registry" / "secrets.key"
    (data / "recorder" / "recorder.db").unlink()
    assert "recorder" not in find(data, env={}).databases
    assert not (data / "recorder" / "recorder.db").exists()


def test_what_ekiben_up_is_told_goes_before_it_and_a_service_s_own_before_that(tmp_path: Path) -> None:
    env = {
        "EKIBEN_DATABASE_URL": "postgresql://ekiben@db/all",
        "EKIBEN_DATABASE_PASSWORD_FILE": "/run/password",
        "EKIBEN_BLOBS_URL": "s3://bucket",
        "EKIBEN_RECORDER_DATABASE_URL": "postgresql://log@other/log",
        "EKIBEN_REGISTRY_SECRETS_KEY_FILE": "/run/key",
    }
    found = find(made(tmp_path / "data"), env=env)
    assert urls(found)["registry"] == "postgresql://ekiben@db/all?schema=ekiben_registry"
    assert urls(found)["recorder"] == "postgresql://log@other/log"
    assert found.databases["registry"].database_password_file == Path("/run/password")
    assert found.databases["recorder"].database_password_file is None
    assert (found.blobs, found.key_file) == ("s3://bucket", Path("/run/key"))
    alone = find(None, env={"EKIBEN_DEPLOYER_DATABASE_URL": "postgresql://d@db/d"})
    assert (urls(alone), alone.blobs) == ({"deployer": "postgresql://d@db/d"}, "")


def test_what_is_not_said_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="There is no installation in"):
        find(tmp_path / "absent", env={})
    with pytest.raises(SettingsError, match="Nothing says where the registry's blobs are"):
        find(None, env={"EKIBEN_REGISTRY_DATABASE_URL": "postgresql://d@db/d"})
    with pytest.raises(SettingsError, match="No service is left"):
        find(made(tmp_path / "data"), env={}).without(*SERVICES)
    assert find(tmp_path / "new", may_make=True, env={}).data == tmp_path / "new"


def test_another_user_s_data_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(tmp_path / "data")
    monkeypatch.setattr("os.geteuid", lambda: data.stat().st_uid + 1)
    with pytest.raises(SettingsError, match="run this as that user"):
        find(data, env={})
