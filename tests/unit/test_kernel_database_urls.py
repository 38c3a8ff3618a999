"""URLs of PostgreSQL: what they say, and that nobody is shown a password."""

from pathlib import Path

import pytest

from services.kernel import postgres
from services.kernel.settings import DatabaseSettings, SettingsError, describe, load
from services.registry.settings import Settings


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hunter2@db:5433/x", "postgresql://me:***@db:5433/x"),
        ("postgresql://me:hunter2@a:1,b:2/x?target_session_attrs=read-write", None),
        ("postgresql+asyncpg://me@/x?host=/run/postgresql&password=hunter2", None),
        ("postgres://me@db/x?sslmode=verify-full&sslpassword=hunter2&schema=s", None),
        ("postgresql://me:hunter2%40x@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:hunter2@[::1]:5432/x", "postgresql://me:***@[::1]:5432/x"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str | None) -> None:
    address = postgres.parse(url)
    assert "hunter2" not in address.shown
    assert shown in (None, address.shown)
    assert "hunter2" in address.dsn
    assert "schema" not in address.dsn


def test_the_schema_is_ours_and_the_rest_is_passed_on() -> None:
    address = postgres.parse("postgresql+asyncpg://u@h/d?schema=ekiben_registry&sslmode=require&statement_timeout=5000")
    assert address.schema == "ekiben_registry"
    assert address.dsn == "postgresql://u@h/d?sslmode=require&statement_timeout=5000"


@pytest.mark.parametrize("schema", ["Registry", "a-b", "1x", 'x"; DROP', "x" * 64])
def test_a_schema_that_needs_quotes_is_refused(schema: str) -> None:
    with pytest.raises(SettingsError, match="schema="):
        postgres.parse(f"postgresql://u@h/d?schema={schema}")


def test_two_passwords_exclude_one_another() -> None:
    with pytest.raises(SettingsError, match="exclude one another"):
        postgres.parse("postgresql://u:p@h/d", Path("/run/password"))


def test_each_service_gets_a_schema_of_its_own() -> None:
    url = "postgresql://u@/d?host=/run/postgresql"
    assert postgres.with_schema(url, "builder") == f"{url}&schema=ekiben_builder"
    assert postgres.with_schema("postgresql://u@h/d?schema=blue", "builder") == "postgresql://u@h/d?schema=blue_builder"


def test_every_service_has_the_settings_of_a_database_and_documents_them() -> None:
    env = {
        "EKIBEN_REGISTRY_DATABASE_URL": "postgresql://u@h/d",
        "EKIBEN_REGISTRY_DATABASE_CONNECTIONS": "1",
        "EKIBEN_REGISTRY_BLOBS_URL": "file:///b",
        "EKIBEN_REGISTRY_SECRETS_KEY_FILE": "/k",
        "EKIBEN_REGISTRY_ADMIN_TOKEN_FILE": "/t",
        "EKIBEN_REGISTRY_UPLOAD_EXPIRE_S": "-1",
    }
    with pytest.raises(SettingsError) as caught:
        load(Settings, "EKIBEN_REGISTRY", env)
    assert len(caught.value.faults) == 2
    assert all(setting.text for setting in describe(Settings, "EKIBEN_REGISTRY"))
    assert {setting.variable for setting in describe(DatabaseSettings, "X")} <= {
        setting.variable for setting in describe(Settings, "X")
    }
