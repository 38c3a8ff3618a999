"""The builder over real gRPC, with a real registry and the real uv."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from ekiben import errors
from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument, NotFound
from ekiben.identity.v1 import identity_pb2
from tests.fixtures_builder import (
    Builder,
    PackageIndex,
    Registry,
    bento_folder,
    builder,
    index,
    registry,
    running_builder,
)
from tests.fixtures_kernel import until
from tests.fixtures_lineage import use

__all__ = ["builder", "index", "registry"]


async def test_a_build_makes_an_environment_and_tells_of_it(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    created = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))
    assert created.state == pb.Build.QUEUED
    assert (created.bento, created.creator, created.progress_percent) == (bento, "users/admin", 0)
    seen = [build async for build in builder.builds.WatchBuild(pb.WatchBuildRequest(name=created.name))]
    percents = [build.progress_percent for build in seen]
    assert percents == sorted(percents)
    assert "resolving requirements" in [build.step for build in seen]
    build = seen[-1]
    assert (build.state, build.step, build.progress_percent, build.cached) == (pb.Build.SUCCEEDED, "ready", 100, False)
    assert build.create_time.ToMicroseconds() <= build.start_time.ToMicroseconds() <= build.end_time.ToMicroseconds()
    assert (build.environment.bentoml_version, build.environment.package_count) == ("1.4.39", 5)
    assert (Path(build.environment.path) / "bin" / "python").exists()
    assert build.environment.digest.removeprefix("sha256:") == Path(build.environment.path).name
    assert await builder.builds.GetBuild(pb.GetBuildRequest(name=created.name)) == build
    assert not list((builder.data_dir / "tmp").iterdir())


async def test_the_same_bento_gives_the_same_build_at_once(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    names = {
        build.name
        for build in await asyncio.gather(
            *(builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento)) for _ in range(5))
        )
    }
    assert len(names) == 1
    first = await builder.ended(names.pop())
    begun = time.monotonic()
    again = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))
    assert time.monotonic() - begun < 0.5
    assert again == first
    latest = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento="bentoRepositories/hello/bentos/latest"))
    assert latest == first


async def test_another_bento_with_the_same_lock_is_built_from_the_cache(
    builder: Builder, index: PackageIndex, tmp_path: Path
) -> None:
    first = await builder.build(await builder.registry.push(bento_folder(tmp_path / "one")))
    index.broken = True
    other = bento_folder(tmp_path / "two", files={"src/service.py": b"import bentoml  # 2\n"})
    second = await builder.build(await builder.registry.push(other, "v2"))
    assert (second.state, second.cached) == (pb.Build.SUCCEEDED, True)
    assert second.environment == first.environment
    assert second.name != first.name


async def test_an_environment_that_is_gone_is_built_again(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    first = await builder.build(bento)
    (Path(first.environment.path) / "complete.json").unlink()
    second = await builder.build(bento)
    assert second.name != first.name
    assert (second.cached, second.environment) == (False, first.environment)


async def test_force_resolves_anew(builder: Builder, index: PackageIndex, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    first = await builder.build(bento)
    index.add("tabulate", "0.11.0")
    forced = await builder.build(bento, force=True)
    assert forced.environment.digest != first.environment.digest


async def test_a_failed_build_says_which_requirement_and_why(builder: Builder, tmp_path: Path) -> None:
    folder = bento_folder(tmp_path / "bento", "tabulate==99.9\nbentoml==1.4.39\n")
    build = await builder.build(await builder.registry.push(folder))
    assert build.state == pb.Build.FAILED
    error = errors.from_status(build.failure)
    assert isinstance(error, FailedPrecondition)
    assert (error.reason, error.metadata["requirement"]) == ("REQUIREMENT_UNSATISFIABLE", "tabulate==99.9")
    assert "tabulate==99.9" in error.message
    lines = await builder.log(build.name)
    assert any("No solution found" in line for line in lines)
    assert lines[-1].startswith("FAILED (REQUIREMENT_UNSATISFIABLE)")
    assert not build.HasField("environment")
    assert (await builder.build(build.bento)).name != build.name


async def test_a_bento_without_content_is_refused(builder: Builder) -> None:
    with pytest.raises(NotFound):
        await builder.builds.CreateBuild(pb.CreateBuildRequest(bento="bentoRepositories/none/bentos/v1"))
    for bad in ("", "hello:v1", "bentoRepositories/hello"):
        with pytest.raises(InvalidArgument):
            await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bad))


async def test_the_log_can_be_followed_from_its_beginning_to_its_end(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    build = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))
    request = pb.ReadBuildLogRequest(name=build.name, follow=True)
    followed = [line async for line in builder.builds.ReadBuildLog(request)]
    assert [line.index for line in followed] == list(range(len(followed)))
    assert followed[0].text.startswith(f"Building {bento}")
    assert followed[-1].text.startswith("Environment sha256:")
    read = [line async for line in builder.builds.ReadBuildLog(pb.ReadBuildLogRequest(name=build.name))]
    assert read == followed
    tail = [line async for line in builder.builds.ReadBuildLog(pb.ReadBuildLogRequest(name=build.name, tail_lines=2))]
    assert tail == followed[-2:]
    with pytest.raises(InvalidArgument):
        await builder.log(build.name, tail_lines=-1)


async def test_cancelling_stops_uv_and_frees_what_it_made(
    builder: Builder, index: PackageIndex, tmp_path: Path
) -> None:
    index.held.clear()
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    build = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))
    await until(lambda: any(path.startswith("/files/") for path in index.requests), "uv downloads")
    cancelled = await builder.builds.CancelBuild(pb.CancelBuildRequest(name=build.name))
    assert cancelled.state == pb.Build.CANCELLED
    assert cancelled.HasField("end_time")
    with pytest.raises(FailedPrecondition) as caught:
        await builder.builds.CancelBuild(pb.CancelBuildRequest(name=build.name))
    assert caught.value.reason == "BUILD_ENDED"
    await until(lambda: not list((builder.data_dir / "tmp").iterdir()), "its folder is gone")
    await until(lambda: not processes_with(str(builder.data_dir)), "its processes are gone")
    index.held.set()
    assert (await builder.build(bento)).state == pb.Build.SUCCEEDED
    assert (await builder.ended(build.name)).state == pb.Build.CANCELLED


async def test_a_queued_build_can_be_cancelled(builder: Builder, index: PackageIndex, tmp_path: Path) -> None:
    index.held.clear()
    first = await builder.builds.CreateBuild(
        pb.CreateBuildRequest(bento=await builder.registry.push(bento_folder(tmp_path / "one"), "v1"))
    )
    waiting = await builder.builds.CreateBuild(
        pb.CreateBuildRequest(bento=await builder.registry.push(bento_folder(tmp_path / "two", "attrs\n"), "v2"))
    )
    assert (await builder.builds.CancelBuild(pb.CancelBuildRequest(name=waiting.name))).state == pb.Build.CANCELLED
    index.held.set()
    assert (await builder.ended(first.name)).state == pb.Build.SUCCEEDED
    assert (await builder.ended(waiting.name)).state == pb.Build.CANCELLED


async def test_secrets_of_the_build_stage_reach_uv_and_never_the_log(
    builder: Builder, index: PackageIndex, tmp_path: Path
) -> None:
    index.credentials = "me:hunter2-hunter2"
    url = index.url.replace("http://", "http://me:hunter2-hunter2@")
    name = await builder.registry.keep_secret("pypi", identity_pb2.Secret.BUILD, UV_DEFAULT_INDEX=url)
    other = await builder.registry.keep_secret("later", identity_pb2.Secret.RUNTIME, LATER="not-for-builds")
    noisy = "import os\nprint('the password is', os.environ.get('UV_DEFAULT_INDEX'))\n"
    index.add("bentoml", "1.4.38", ["tabulate"], noisy)
    folder = bento_folder(tmp_path / "bento", "", manifest={"bentoml_version": "1.4.38"})
    bento = await builder.registry.push(folder)
    assert (await builder.build(bento)).state == pb.Build.FAILED
    build = await builder.build(bento, secrets=[name, other])
    lines = await builder.log(build.name)
    assert build.state == pb.Build.SUCCEEDED, lines
    assert "hunter2" not in "\n".join(lines)
    assert any("secrets/later is for replicas only" in line for line in lines)
    missing = await builder.build(bento, secrets=["secrets/none"])
    assert errors.from_status(missing.failure).reason == "SECRET_NOT_FOUND"


async def test_lists_are_pages_newest_first(builder: Builder, tmp_path: Path) -> None:
    names = []
    for number in range(3):
        bento = await builder.registry.push(bento_folder(tmp_path / str(number)), f"v{number}")
        names.append((await builder.build(bento)).name)
    page = await builder.builds.ListBuilds(pb.ListBuildsRequest(page_size=2))
    assert [build.name for build in page.builds] == [names[2], names[1]]
    rest = pb.ListBuildsRequest(page_size=2, page_token=page.next_page_token)
    page = await builder.builds.ListBuilds(rest)
    assert ([build.name for build in page.builds], page.next_page_token) == ([names[0]], "")
    one = pb.ListBuildsRequest(bento="bentoRepositories/hello/bentos/v1")
    assert [build.name for build in (await builder.builds.ListBuilds(one)).builds] == [names[1]]
    for wrong in (
        pb.ListBuildsRequest(page_size=-1),
        pb.ListBuildsRequest(page_token="x"),
        pb.ListBuildsRequest(bento="x"),
    ):
        with pytest.raises(InvalidArgument):
            await builder.builds.ListBuilds(wrong)


async def test_what_is_not_there_is_not_found(builder: Builder) -> None:
    for call in (
        builder.builds.GetBuild(pb.GetBuildRequest(name="builds/none")),
        builder.builds.CancelBuild(pb.CancelBuildRequest(name="builds/none")),
        builder.log("builds/none"),
        builder.ended("builds/none"),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.reason == "BUILD_NOT_FOUND"


async def test_a_bento_that_is_no_bento_fails_with_a_sentence(builder: Builder, tmp_path: Path) -> None:
    folder = bento_folder(tmp_path / "bento", files={"bento.yaml": b"- just\n- a list\n"})
    build = await builder.build(await builder.registry.push(folder))
    error = errors.from_status(build.failure)
    assert (error.reason, build.state) == ("BENTO_INCOMPLETE", pb.Build.FAILED)
    assert "bento.yaml holds no mapping" in error.message


async def test_a_builder_that_stops_gives_its_build_back_and_the_next_one_ends_it(
    registry: Registry, index: PackageIndex, tmp_path: Path
) -> None:
    index.held.clear()
    bento = await registry.push(bento_folder(tmp_path / "bento"))
    async with running_builder(registry, tmp_path / "builder") as first:
        name = (await first.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))).name
        await until(lambda: any(path.startswith("/files/") for path in index.requests), "uv downloads")
    assert not processes_with(str(tmp_path / "builder"))
    index.held.set()
    async with running_builder(registry, tmp_path / "builder") as second:
        build = await second.ended(name)
        assert build.state == pb.Build.SUCCEEDED
        assert any("The builder is stopping" in line for line in await second.log(name))


async def test_a_bug_fails_the_build_and_not_the_builder(
    registry: Registry, index: PackageIndex, tmp_path: Path
) -> None:
    faults = ["resolve"]

    async def failpoint(step: str) -> None:
        if step in faults:
            faults.remove(step)
            raise ZeroDivisionError("secret internals")

    bento = await registry.push(bento_folder(tmp_path / "bento"))
    async with running_builder(registry, tmp_path / "builder", failpoint) as builder:
        build = await builder.build(bento)
        error = errors.from_status(build.failure)
        assert (build.state, error.reason) == (pb.Build.FAILED, "INTERNAL")
        assert "secret internals" not in error.message
        assert (await builder.build(bento)).state == pb.Build.SUCCEEDED


async def test_a_full_disk_fails_the_build_in_words(registry: Registry, index: PackageIndex, tmp_path: Path) -> None:
    async def failpoint(step: str) -> None:
        if step == "install":
            raise OSError(28, "No space left on device")

    async with running_builder(registry, tmp_path / "builder", failpoint) as builder:
        build = await builder.build(await registry.push(bento_folder(tmp_path / "bento")))
        error: EkibenError = errors.from_status(build.failure)
        assert (build.state, error.reason, error.code_name) == (pb.Build.FAILED, "DISK_FULL", "RESOURCE_EXHAUSTED")


def processes_with(text: str) -> list[str]:
    """Command lines of processes of the machine which contain a text, but for our own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in line and "pytest" not in line:
            found.append(line)
    return found


async def test_what_the_builder_keeps_is_told_and_pruned_but_for_what_deployments_run_from(
    registry: Registry, index: PackageIndex, tmp_path: Path
) -> None:
    no_time = {"caches_keep_days": 0.0, "images_grace_s": 0.001, "build_timeout_s": 60.0}
    async with running_builder(registry, tmp_path / "builder", **no_time) as builder:
        used = await builder.build(await registry.push(bento_folder(tmp_path / "one")))
        unused = await builder.build(
            await registry.push(bento_folder(tmp_path / "two", "cattrs\nbentoml==1.4.39\n"), "v2")
        )
        await use(registry, used.name)
        stats = await builder.builds.GetCacheStats(pb.GetCacheStatsRequest())
        found = {each.kind: each for each in stats.kinds}
        assert found["environments"].count == 2 and found["environments"].size_bytes > 0
        assert found["locks"].count == found["logs"].count == 2 and stats.location == str(tmp_path / "builder")
        assert not (await builder.builds.PruneCaches(pb.PruneCachesRequest())).kinds, "a build may be using all that"
        for build in (used, unused):
            os.utime(build.environment.path, (0, 0))
        would = await builder.builds.PruneCaches(pb.PruneCachesRequest(dry_run=True))
        assert Path(unused.environment.path).exists()
        done = await builder.builds.PruneCaches(pb.PruneCachesRequest())
        assert done == would and {each.kind: each.count for each in done.kinds} == {"environments": 1}
        assert Path(used.environment.path).exists() and not Path(unused.environment.path).exists()
        again = await builder.build(unused.bento)
        assert again.name != unused.name and again.environment == unused.environment
