"""A real PostgreSQL as operators run it: passwords, TLS, a schema for each service, and what its refusals say."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ekiben import errors
from services.kernel.db import Database, open_database
from services.kernel.settings import DatabaseSettings
from tests.certificates import certificates
from tests.platform import free_port
from tests.postgres import PostgresServer, running_postgres

MIGRATIONS = ("services.registry", "services.builder", "services.deployer", "services.recorder")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that asks for a password over TLS, and lets nobody in without TLS."""
    port = free_port()
    with running_postgres(port=port) as server:
        folder = tmp_path_factory.mktemp("tls")
        certificates(folder)
        for name in ("ca.pem", "cert.pem", "key.pem"):
            target = server.data / name
            target.write_bytes((folder / name).read_bytes())
            target.chmod(0o600)
            if os.getuid() == 0:
                os.chown(target, server.data.stat().st_uid, -1)
        server.psql("CREATE ROLE keeper LOGIN PASSWORD 'pass:w/ord'")
        server.psql("CREATE DATABASE kept OWNER keeper")
        (server.data / "pg_hba.conf").write_text(
            "local all postgres trust\nlocal all all scram-sha-256\nhostssl all all all scram-sha-256\n"
        )
        server.options += f" -c ssl=on -c ssl_cert_file={server.data}/cert.pem -c ssl_key_file={server.data}/key.pem"
        server.restart()
        yield server


def _tls(server: PostgresServer, user: str = "keeper", **parameters: str) -> str:
    query = "&".join(f"{key}={value}" for key, value in parameters.items())
    return f"postgresql://{user}@localhost:{server.port}/kept?{query}"


async def _who(settings: DatabaseSettings) -> tuple[str, bool]:
    """The user that the server knows, and whether over TLS."""
    async with open_database(settings) as database, database.read() as connection:
        row = (
            await connection.execute(
                sa.text(
                    "SELECT current_user, coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)"
                )
            )
        ).one()
        return str(row[0]), bool(row[1])


async def _refused(settings: DatabaseSettings) -> str:
    """The sentence that stops a start."""
    async with open_database(settings) as database:
        with pytest.raises(errors.Unavailable) as caught:
            await database.migrate("services.builder.migrations")
        assert caught.value.reason == "DATABASE_UNAVAILABLE"
        return caught.value.message


async def test_a_password_comes_from_a_file_and_may_change_without_a_restart(
    guarded: PostgresServer, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("pass:w/ord\n")
    url = _tls(guarded, sslmode="verify-full", sslrootcert=f"{guarded.data}/ca.pem")
    settings = DatabaseSettings(database_url=url, database_password_file=file)
    assert await _who(settings) == ("keeper", True)
    async with open_database(settings) as database:
        await database.ping()
        guarded.psql("ALTER ROLE keeper PASSWORD 'another'")
        file.write_text("another")
        guarded.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'keeper'")
        await database.ping()
    guarded.psql("ALTER ROLE keeper PASSWORD 'pass:w/ord'")


async def test_libpqs_own_ways_work(guarded: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = _tls(guarded, sslmode="require")
    monkeypatch.setenv("PGPASSWORD", "pass:w/ord")
    assert await _who(DatabaseSettings(database_url=url)) == ("keeper", True)
    monkeypatch.delenv("PGPASSWORD")
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"localhost:{guarded.port}:kept:keeper:pass:w/ord\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    assert await _who(DatabaseSettings(database_url=url)) == ("keeper", True)
    services = tmp_path / "services.conf"
    services.write_text(f"[kept]\nhost=localhost\nport={guarded.port}\ndbname=kept\nuser=keeper\nsslmode=require\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    assert await _who(DatabaseSettings(database_url="postgresql://?service=kept")) == ("keeper", True)
    both = f"postgresql://keeper@127.0.0.1:1,localhost:{guarded.port}/kept?sslmode=require"
    passfile.write_text("*:*:*:*:pass:w/ord\n")
    assert await _who(DatabaseSettings(database_url=both)) == ("keeper", True)


async def test_a_refusal_says_what_to_do_and_shows_no_password(guarded: PostgresServer, tmp_path: Path) -> None:
    ca = f"{guarded.data}/ca.pem"
    wrong = _tls(guarded, sslmode="require").replace("keeper@", "keeper:hunter2@")
    said = await _refused(DatabaseSettings(database_url=wrong))
    assert "lets this user not in" in said
    assert "PGPASSFILE" in said
    assert "hunter2" not in said
    other = tmp_path / "other"
    other.mkdir()
    certificates(other)
    said = await _refused(
        DatabaseSettings(database_url=_tls(guarded, sslmode="verify-ca", sslrootcert=f"{other}/ca.pem"))
    )
    assert "sslrootcert" in said
    assert "trusted" in said
    said = await _refused(DatabaseSettings(database_url=_tls(guarded, sslmode="verify-ca", sslrootcert="/no/such.pem")))
    assert "/no/such.pem" in said
    said = await _refused(DatabaseSettings(database_url=_tls(guarded, sslmode="disable")))
    assert "no encryption" in said
    missing = _tls(guarded, sslmode="verify-full", sslrootcert=ca).replace("/kept", "/missing")
    missing = missing.replace("keeper@", "keeper:pass%3Aw%2Ford@")
    assert "does not exist" in (said := await _refused(DatabaseSettings(database_url=missing)))
    assert "createdb" in said
    said = await _refused(DatabaseSettings(database_url=f"postgresql://u@127.0.0.1:{free_port()}/x"))
    assert "does not answer" in said
    assert "Start PostgreSQL" in said
    file = DatabaseSettings(database_url=_tls(guarded), database_password_file=tmp_path / "none")
    assert f"{tmp_path}/none" in await _refused(file)


async def test_a_role_that_may_make_no_tables_is_told_how(guarded: PostgresServer) -> None:
    guarded.psql("CREATE ROLE guest LOGIN PASSWORD 'g'")
    for schema in ("", "&schema=mine"):
        url = _tls(guarded, "guest:g", sslmode="require") + schema
        async with open_database(url) as database:
            with pytest.raises(errors.FailedPrecondition, match="CREATE SCHEMA") as caught:
                await database.migrate("services.builder.migrations")
        assert caught.value.reason == "DATABASE_NOT_PERMITTED"
    guarded.psql("CREATE SCHEMA mine AUTHORIZATION guest", "kept")
    async with open_database(url) as database:
        await database.migrate("services.builder.migrations")


async def test_four_services_share_a_database_and_see_nothing_of_one_another(postgres: PostgresServer) -> None:
    url = postgres.create("shared")
    async with asyncio.TaskGroup() as group:
        for package in MIGRATIONS * 2:  # two replicas of each, at once
            group.create_task(_migrate(url, package))
    found = postgres.psql(
        "SELECT schemaname, count(*) FROM pg_tables WHERE schemaname !~ '^(pg_|information)' GROUP BY 1 ORDER BY 1",
        "shared",
    )
    names = [line.split("|")[0] for line in found.splitlines()]
    assert names == ["ekiben_builder", "ekiben_deployer", "ekiben_recorder", "ekiben_registry"]
    async with open_database(f"{url}&schema=ekiben_builder") as database, database.read() as connection:
        with pytest.raises(sa.exc.ProgrammingError):
            await connection.execute(sa.text("SELECT 1 FROM deployments"))


async def _migrate(url: str, package: str) -> None:
    async with open_database(f"{url}&schema=ekiben_{package.rpartition('.')[2]}") as database:
        await database.migrate(f"{package}.migrations")


async def test_one_at_a_time_among_processes(postgres: PostgresServer) -> None:
    url = postgres.create("alone")
    async with open_database(url) as one, open_database(url) as two:
        async with one.alone("sweep") as held:
            assert held
            async with two.alone("sweep", wait=False) as also:
                assert not also
            async with two.alone("another", wait=False) as also:
                assert also
            waiting = asyncio.create_task(_hold(two))
        await asyncio.wait_for(waiting, 10)


async def _hold(database: Database) -> None:
    async with database.alone("sweep") as held:
        assert held
