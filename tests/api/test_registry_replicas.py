"""Two registries on one PostgreSQL and one S3: each is as good as the other, also with clocks two hours apart."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import Aborted, EkibenError, Unauthenticated
from ekiben.identity.v1 import identity_pb2 as ipb
from ekiben.registry.v1 import registry_pb2 as pb
from services.kernel.clock import ManualClock, SystemClock
from services.registry.uploads import Uploads
from tests.fixtures_registry import Registry, model_archive, run_registry, until
from tests.postgres import PostgresServer
from tests.s3 import S3Server


class Skewed(SystemClock):
    """A machine whose clock is wrong."""

    def __init__(self, by: timedelta) -> None:
        self._by = by

    def now(self):  # type: ignore[no-untyped-def]
        return super().now() + self._by


@asynccontextmanager
async def two_registries(
    postgres: PostgresServer, s3: S3Server, folder: Path
) -> AsyncIterator[tuple[Registry, Registry]]:
    """One an hour ahead, one an hour behind; both collect all the time."""
    url, blobs = f"{postgres.create(f'r{os.urandom(6).hex()}')}&schema=ekiben_registry", s3.new_url()
    shared = {"database_url": url, "blobs_url": blobs, "garbage_grace_s": 60.0, "collect_interval_s": 0.2}
    one_folder, two_folder = folder / "one", folder / "two"
    one_folder.mkdir()
    two_folder.mkdir()
    async with run_registry(one_folder, clock=Skewed(timedelta(hours=1)), **shared) as one:
        own = {"secrets_key_file": one.settings.secrets_key_file, "admin_token_file": one.settings.admin_token_file}
        async with run_registry(two_folder, clock=Skewed(timedelta(hours=-1)), **shared, **own) as two:
            yield one, two


async def _model(registry: Registry, version: str) -> pb.Model:
    name = f"modelRepositories/iris/models/{version}"
    return await registry.admin.models.GetModel(pb.GetModelRequest(name=name))


async def test_an_upload_goes_on_at_another_registry_and_what_is_stored_is_there_for_all(
    postgres: PostgresServer, s3: S3Server, tmp_path: Path
) -> None:
    async with two_registries(postgres, s3, tmp_path) as (one, two):
        model = await one.new_model(one.admin, "iris", "v1")
        for _ in range(5):  # a claim that another's clock calls over is told, and pushed again
            wanted = pb.Upload(resource=model.name)
            upload = await two.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=wanted))
            signed = await one.admin.uploads.SignUpload(pb.SignUploadRequest(name=upload.name))
            status, _, body = await two.put(signed.url, model_archive())
            assert status == 200, body
            # A client that was cut off completes again, at whichever answers.
            completing = [
                registry.admin.uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload.name))
                for registry in (one, two)
            ]
            done = await asyncio.gather(*completing, return_exceptions=True)
            assert all(isinstance(each, pb.Upload | EkibenError) for each in done), done
            if any(isinstance(each, pb.Upload) and each.state == pb.Upload.COMPLETED for each in done):
                break
            assert "CLAIM_LOST" in [each.reason for each in done if isinstance(each, EkibenError)], done
        else:
            raise AssertionError(f"it could not be pushed: {done}")
        assert (await _model(two, "v1")).content.state == pb.Content.READY
        for registry in (two, one):
            download = await registry.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=model.name))
            status, content, _ = await registry.get(download.url)
            assert (status, content) == (200, model_archive())


async def test_both_push_at_once_and_collectors_take_nothing_that_is_named(
    postgres: PostgresServer, s3: S3Server, tmp_path: Path
) -> None:
    async with two_registries(postgres, s3, tmp_path) as (one, two):

        async def push(number: int) -> str:
            registry = (one, two)[number % 2]
            name = f"modelRepositories/iris/models/v{number}"
            await registry.new_model(registry.admin, "iris", f"v{number}")
            for _ in range(5):  # a claim that another's clock calls over is told, and pushed again
                try:
                    await registry.push(registry.admin, name, model_archive(b"weights %d" % (number // 2)))
                    return name
                except EkibenError as exc:
                    assert exc.reason in ("CLAIM_LOST", "BLOB_BUSY", "UPLOAD_ENDED"), exc
            raise AssertionError(f"{name} could not be pushed")

        pushed = await asyncio.gather(*map(push, range(8)))
        for number, name in enumerate(pushed):
            registry = (two, one)[number % 2]  # the other one
            download = await registry.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=name))
            status, content, _ = await registry.get(download.url)
            assert (status, content) == (200, model_archive(b"weights %d" % (number // 2)))


LOSE = """
CREATE SEQUENCE ekiben_registry.writes;
CREATE SEQUENCE ekiben_registry.losses;
CREATE FUNCTION ekiben_registry.lose() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF nextval('ekiben_registry.writes') % 5 = 1 THEN
    PERFORM nextval('ekiben_registry.losses');
    RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER lose BEFORE INSERT OR UPDATE ON ekiben_registry.uploads FOR EACH ROW EXECUTE FUNCTION ekiben_registry.lose();
CREATE TRIGGER lose BEFORE INSERT OR UPDATE ON ekiben_registry.blobs FOR EACH ROW EXECUTE FUNCTION ekiben_registry.lose();
CREATE TRIGGER lose BEFORE INSERT OR UPDATE ON ekiben_registry.blob_listings
  FOR EACH ROW EXECUTE FUNCTION ekiben_registry.lose();
"""


async def test_a_push_whose_transactions_are_given_up_for_others_comes_through(
    postgres: PostgresServer, s3: S3Server, tmp_path: Path
) -> None:
    name = f"r{os.urandom(6).hex()}"
    url = f"{postgres.create(name)}&schema=ekiben_registry"
    async with run_registry(tmp_path, database_url=url, blobs_url=s3.new_url(), collect_interval_s=3600.0) as running:
        model = await running.new_model(running.admin, "iris", "v1")
        # In a thread: it waits for transactions of the registry, which runs in this one.
        await asyncio.to_thread(postgres.psql, LOSE, database=name)
        await running.push(running.admin, model.name, model_archive())
        assert (await _model(running, "v1")).content.state == pb.Content.READY
        assert int(postgres.psql("SELECT last_value FROM ekiben_registry.losses", database=name)) > 1


@pytest.mark.parametrize("made", [True, False])
async def test_a_completion_of_whose_commit_nobody_knows_is_asked_for_again(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    commit, lost = Uploads._commit, [True]

    async def unknown(self: Uploads, *what: Any) -> None:
        if not lost:
            return await commit(self, *what)
        lost.pop()
        if made:
            await commit(self, *what)
        raise Aborted("It may have been made, or not.", reason="COMMIT_UNKNOWN")

    monkeypatch.setattr(Uploads, "_commit", unknown)
    async with run_registry(tmp_path, database_url=database_url) as running:
        model = await running.new_model(running.admin, "iris", "v1")
        upload = await running.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=model.name)))
        signed = await running.admin.uploads.SignUpload(pb.SignUploadRequest(name=upload.name))
        assert (await running.put(signed.url, model_archive()))[0] == 200
        with pytest.raises(Aborted) as caught:
            await running.admin.uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload.name))
        assert caught.value.reason == "COMMIT_UNKNOWN"
        await running.admin.uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload.name))
        assert (await _model(running, "v1")).content.state == pb.Content.READY


async def test_a_token_that_is_deleted_at_one_ends_at_the_other_within_seconds(
    postgres: PostgresServer, s3: S3Server, tmp_path: Path
) -> None:
    async with two_registries(postgres, s3, tmp_path) as (one, two):
        wanted = ipb.ApiToken(display_name="t")
        created = await one.admin.accounts.CreateApiToken(ipb.CreateApiTokenRequest(api_token=wanted))
        elsewhere = two.stubs(created.token)
        await elsewhere.accounts.GetCaller(ipb.GetCallerRequest())
        await one.admin.accounts.DeleteApiToken(ipb.DeleteApiTokenRequest(name=created.name))

        async def refused() -> bool:
            try:
                await elsewhere.accounts.GetCaller(ipb.GetCallerRequest())
            except Unauthenticated:
                return True
            return False

        await until(refused, 8)


async def test_a_second_machine_without_the_first_ones_key_file_does_not_start_and_ends_no_token(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    url = f"{postgres.create(f'r{os.urandom(6).hex()}')}&schema=ekiben_registry"
    one_folder, two_folder = tmp_path / "one", tmp_path / "two"
    one_folder.mkdir()
    two_folder.mkdir()
    async with run_registry(one_folder, database_url=url) as one:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with run_registry(two_folder, database_url=url):
                pass
        assert "Copy it from there" in str(caught.value.exceptions[0])
        assert not (two_folder / "secrets-key").exists()
        assert (await one.admin.accounts.GetCaller(ipb.GetCallerRequest())).user == "users/admin"


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_clock_that_is_set_in_the_middle_of_an_upload_breaks_nothing(
    database_url: str, tmp_path: Path, hours: int
) -> None:
    clock = ManualClock()
    async with run_registry(tmp_path, database_url=database_url, clock=clock) as running:
        model = await running.new_model(running.admin, "iris", "v1")
        wanted = pb.Upload(resource=model.name)
        upload = await running.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=wanted))
        signed = await running.admin.uploads.SignUpload(pb.SignUploadRequest(name=upload.name))
        clock.jump(timedelta(hours=hours))
        assert (await running.put(signed.url, model_archive()))[0] == 200
        clock.jump(timedelta(hours=hours))
        await running.admin.uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload.name))
        download = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=model.name))
        clock.jump(timedelta(hours=hours))
        await clock.advance(400)  # a round of the collector
        assert (await running.get(download.url))[1] == model_archive()
        assert (
            await running.admin.models.GetModel(pb.GetModelRequest(name=model.name))
        ).content.state == pb.Content.READY
