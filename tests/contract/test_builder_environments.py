"""Locks and environments made by the real uv, from an index of the test's own."""

import asyncio
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ekiben.errors import EkibenError
from services.builder import bento
from services.builder.domain import Environment, Step
from services.builder.environments import Environments
from services.builder.interpreters import Interpreters
from services.builder.locks import Lock, Locks, Work
from services.builder.recipe import Recipe, make_recipe
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.kernel.clock import SYSTEM
from tests.fixtures_builder import PackageIndex, bento_folder, index, wheel

__all__ = ["index"]


@dataclass
class Bench:
    """A builder's hands without its queue."""

    data_dir: Path
    programs: Programs
    locks: Locks
    environments: Environments
    interpreters: Interpreters
    lines: list[str] = field(default_factory=list)
    steps: list[tuple[Step, int, int]] = field(default_factory=list)
    builds: int = 0

    def work(self, organization: str = "", **env: str) -> Work:
        self.builds += 1
        directory = self.data_dir / "tmp" / str(self.builds)
        directory.mkdir(parents=True)

        async def report(step: Step, done: int, of: int) -> None:
            self.steps.append((step, done, of))

        return Work(directory, self.lines.append, report, env, organization)

    async def lock(self, folder: Path, *, fresh: bool = False, **env: str) -> Lock:
        recipe = make_recipe(bento.read(folder))
        interpreter = await self.interpreters.find(recipe.python, self.lines.append)
        return await self.locks.make(recipe, interpreter, folder, self.work(**env), fresh=fresh)

    async def make(
        self, folder: Path, *, fresh: bool = False, verify: bool = False, organization: str = "", **env: str
    ) -> tuple[Environment, bool]:
        recipe = make_recipe(bento.read(folder))
        interpreter = await self.interpreters.find(recipe.python, self.lines.append)
        work = self.work(organization, **env)
        lock = await self.locks.make(recipe, interpreter, folder, work, fresh=fresh)
        return await self.environments.make(lock, recipe, interpreter, work, verify=verify)

    async def refused(self, folder: Path, **env: str) -> EkibenError:
        with pytest.raises(EkibenError) as caught:
            await self.make(folder, **env)
        assert self.nothing_made()
        return caught.value

    def nothing_made(self) -> bool:
        return not [path for path in (self.data_dir / "environments").iterdir() if path.is_dir()]

    def installed(self, environment: Environment) -> dict[str, str]:
        site = next((self.environments.path(environment.digest) / "lib").glob("python*/site-packages"))
        names = (path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info"))
        return dict(name.rsplit("-", 1) for name in names)


@pytest.fixture
def bench(tmp_path: Path, index: PackageIndex) -> Bench:
    data_dir = tmp_path / "data"
    settings = Settings(database_url="", data_dir=data_dir, python_downloads=False)
    programs = Programs(data_dir, tmp_path / "run")
    locks = Locks(data_dir, programs)
    interpreters = Interpreters(programs, settings, SYSTEM)
    return Bench(data_dir, programs, locks, Environments(data_dir, programs, locks), interpreters)


async def test_an_environment_has_what_the_lock_says_and_runs(bench: Bench, tmp_path: Path) -> None:
    environment, cached = await bench.make(bento_folder(tmp_path / "bento"))
    assert not cached
    expected = {"bentoml": "1.4.39", "attrs": "26.1.0", "tabulate": "0.10.0"}
    exporters = ("opentelemetry_exporter_otlp", "opentelemetry_exporter_otlp_proto_http")
    assert bench.installed(environment) == {**expected, **dict.fromkeys(exporters, "1.45.1")}
    assert (environment.bentoml_version, environment.package_count) == ("1.4.39", 5)
    assert environment.size_bytes > 0
    python = bench.environments.path(environment.digest) / "bin" / "python"
    outcome = await bench.programs.run([str(python), "-c", "import bentoml; print(bentoml.__version__)"], cwd=tmp_path)
    assert (outcome.returncode, outcome.text) == (0, "1.4.39")
    assert (Step.INSTALLING, 5) in {(step, of) for step, _, of in bench.steps}
    assert bench.environments.find(environment.digest) == environment


async def test_bentos_with_the_same_lock_share_an_environment_and_need_no_network(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    first, _ = await bench.make(bento_folder(tmp_path / "one"))
    index.broken = True
    second, cached = await bench.make(bento_folder(tmp_path / "two", files={"src/other.py": b"x = 1\n"}))
    assert (second, cached) == (first, True)


async def test_a_new_environment_of_a_known_lock_needs_no_network(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    first, _ = await bench.make(bento_folder(tmp_path / "one"))
    shutil.rmtree(bench.environments.path(first.digest))
    index.broken = True
    again, cached = await bench.make(bento_folder(tmp_path / "one"))
    assert (again.digest, cached) == (first.digest, False)


async def test_an_index_that_forgets_a_release_for_a_moment_is_asked_again(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    index.forgotten["tabulate"] = 2
    environment, _ = await bench.make(bento_folder(tmp_path / "bento"))
    assert bench.installed(environment)["tabulate"] == "0.10.0"
    assert index.forgotten["tabulate"] == 0
    assert any("does not know tabulate" in line for line in bench.lines)


async def test_a_lock_stays_until_a_fresh_one_is_asked_for(bench: Bench, index: PackageIndex, tmp_path: Path) -> None:
    folder = bento_folder(tmp_path / "bento")
    first = await bench.lock(folder)
    index.add("tabulate", "0.11.0")
    assert await bench.lock(folder) == first
    fresh = await bench.lock(folder, fresh=True)
    assert (first.packages["tabulate"], fresh.packages["tabulate"]) == ("0.10.0", "0.11.0")
    assert "--hash=sha256:" in fresh.text


async def test_what_is_half_made_is_never_found(bench: Bench, tmp_path: Path) -> None:
    environment, _ = await bench.make(bento_folder(tmp_path / "bento"))
    path = bench.environments.path(environment.digest)
    (path / "complete.json").unlink()
    assert bench.environments.find(environment.digest) is None
    again, cached = await bench.make(bento_folder(tmp_path / "bento"))
    assert (again.digest, cached) == (environment.digest, False)
    (path / "bin" / "python").unlink()
    (path / "bin" / "python").symlink_to("/nowhere/python3.11")
    assert bench.environments.find(environment.digest) is None


async def test_an_environment_whose_files_changed_is_made_anew_when_that_is_asked(bench: Bench, tmp_path: Path) -> None:
    environment, _ = await bench.make(bento_folder(tmp_path / "bento"))
    assert (await bench.make(bento_folder(tmp_path / "bento"), verify=True))[1]
    site = next((bench.environments.path(environment.digest) / "lib").glob("python*/site-packages"))
    shutil.rmtree(site / "tabulate")
    again, cached = await bench.make(bento_folder(tmp_path / "bento"), verify=True)
    assert (again.digest, cached) == (environment.digest, False)
    assert (site / "tabulate").is_dir()


async def test_two_at_once_make_one(bench: Bench, tmp_path: Path) -> None:
    folders = [bento_folder(tmp_path / str(number)) for number in range(2)]
    made = await asyncio.gather(*map(bench.make, folders))
    assert {environment.digest for environment, _ in made} == {made[0][0].digest}
    assert sorted(cached for _, cached in made) == [False, True]


async def test_old_bentoml_gets_what_it_needs(bench: Bench, tmp_path: Path) -> None:
    old = {"bentoml_version": "1.1.11", "image": None, "docker": {"python_version": "3.11"}}
    environment, _ = await bench.make(bento_folder(tmp_path / "bento", "tabulate\n", manifest=old))
    assert bench.installed(environment)["setuptools"] == "80.9.0"
    pinned = bento_folder(tmp_path / "pinned", "setuptools==82.0.0\n", manifest=old)
    environment, _ = await bench.make(pinned)
    assert bench.installed(environment)["setuptools"] == "80.9.0"


async def test_tracing_is_left_out_where_it_does_not_go(bench: Bench, index: PackageIndex, tmp_path: Path) -> None:
    folder = bento_folder(tmp_path / "bento", "tabulate==0.10.0\nbentoml==1.4.39\n")
    index.add("opentelemetry-exporter-otlp", "1.45.1", ["tabulate<0.10"])
    installed = bench.installed((await bench.make(folder))[0])
    assert "opentelemetry_exporter_otlp_proto_http" in installed
    assert "opentelemetry_exporter_otlp" not in installed
    index.add("opentelemetry-exporter-otlp-proto-http", "1.45.1", ["tabulate<0.10"])
    shutil.rmtree(bench.data_dir / "cache")
    environment, _ = await bench.make(folder, fresh=True)
    assert "opentelemetry_exporter_otlp_proto_http" not in bench.installed(environment)
    assert any(line.startswith("WARNING: opentelemetry-exporter-otlp") for line in bench.lines)


async def test_wheels_and_sources_in_the_bento_are_installed(bench: Bench, tmp_path: Path) -> None:
    name = "mine-2.0-py3-none-any.whl"
    folder = bento_folder(
        tmp_path / "bento",
        f"./wheels/{name}\nbentoml==1.4.39\n",
        files={f"src/wheels/{name}": wheel("mine", "2.0", ["tabulate"])},
    )
    environment, _ = await bench.make(folder)
    assert bench.installed(environment)["mine"] == "2.0"
    lock = (bench.environments.path(environment.digest) / "lock.txt").read_text()
    assert "shipped:" in lock
    assert str(bench.data_dir) not in lock


@pytest.mark.parametrize("folder", [False, True])
def test_one_content_under_several_names_is_kept_under_each_by_many_builds_at_once(
    bench: Bench, tmp_path: Path, folder: bool
) -> None:
    """As two workers of one builder do, in threads."""
    names = ["src/one", "src/another"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "setup.py").write_text("x" * 100_000)
    if not folder:
        names = [f"{name}/{Path(name).name}.whl" for name in names]
        for name in names:
            (tmp_path / name).write_bytes(b"wheel")

    directories = [bench.work().directory for _ in range(16)]

    def keep(number: int) -> dict[str, Path]:
        shipped = {names[number % 2]: "d" * 64}
        recipe = Recipe("3.11", "1.4.39", (), shipped=shipped)
        return bench.locks._keep_shipped(recipe, tmp_path, directories[number])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(keep, range(16)))
    for number, kept in enumerate(found):
        path = kept[names[number % 2]]
        assert path.name == Path(names[number % 2]).name
        content = path / "setup.py" if folder else path
        assert content.read_bytes() == (b"x" * 100_000 if folder else b"wheel")
    left = [path for path in (bench.data_dir / "shipped").rglob("*") if path.name.startswith(".")]
    assert not left and not list((bench.data_dir / "tmp").glob("*/*"))


def test_a_file_that_is_kept_by_another_name_is_there_under_both(bench: Bench, tmp_path: Path) -> None:
    names = []
    for name in ("a-1.0-py3-none-any.whl", "a-1.0-1-py3-none-any.whl"):
        (tmp_path / name).write_bytes(b"wheel")
        names.append(bench.locks.keep_file(tmp_path / name, bench.work().directory))
    assert [bench.locks.file(name).read_bytes() for name in names] == [b"wheel", b"wheel"]


def test_what_cannot_be_kept_is_an_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    recipe = Recipe("3.11", "1.4.39", (), shipped={"src": "d" * 64})
    (bench.data_dir / "shipped" / ("d" * 64)).write_text("a file")
    with pytest.raises(OSError):
        bench.locks._keep_shipped(recipe, tmp_path, bench.work().directory)


@pytest.mark.parametrize(
    ("requirements", "reason", "words"),
    [
        ("tabulate==99.9\nbentoml==1.4.39\n", "REQUIREMENT_UNSATISFIABLE", "tabulate==99.9"),
        ("tabulate==0.10.0\ntabulate<0.10\nbentoml==1.4.39\n", "REQUIREMENT_UNSATISFIABLE", "tabulate"),
        ("no-such-thing\nbentoml==1.4.39\n", "REQUIREMENT_NOT_FOUND", "no-such-thing"),
        ("bad requirement !!\nbentoml==1.4.39\n", "REQUIREMENT_INVALID", "bad requirement !!"),
        ("tabulate==0.10.0 --hash=sha256:" + "0" * 64 + "\nbentoml==1.4.39\n", "REQUIREMENT_HASH_MISMATCH", "tabulate"),
        ("x @ http://127.0.0.1:1/x-1-py3-none-any.whl\nbentoml==1.4.39\n", "INDEX_UNREACHABLE", "x"),
        ("--index-url http://127.0.0.1:1/simple\nbentoml==1.4.39\n", "INDEX_UNREACHABLE", "127.0.0.1:1"),
        ("tabulate @ git+file:///no/such/repository\nbentoml==1.4.39\n", "GIT_FAILED", "/no/such/repository"),
    ],
)
async def test_a_failure_names_the_requirement_and_the_reason(
    bench: Bench, tmp_path: Path, requirements: str, reason: str, words: str
) -> None:
    error = await bench.refused(bento_folder(tmp_path / "bento", requirements))
    assert error.reason == reason, error.message
    assert words in error.message


async def test_a_source_that_does_not_build_names_itself_and_its_error(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    index.add_source("broken", "1.0", "raise RuntimeError('needs libfoo')\n")
    error = await bench.refused(bento_folder(tmp_path / "bento", "broken\nbentoml==1.4.39\n"))
    assert error.reason == "BUILD_BACKEND_FAILED", error.message
    assert "broken" in error.message
    assert "needs libfoo" in error.message
    assert any("needs libfoo" in line for line in bench.lines)


async def test_an_index_that_is_away_is_said_to_be(bench: Bench, index: PackageIndex, tmp_path: Path) -> None:
    index.broken = True
    error = await bench.refused(bento_folder(tmp_path / "bento"))
    assert error.reason == "INDEX_UNREACHABLE", error.message


async def test_a_private_index_opens_to_a_secret_which_is_never_shown(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    index.credentials = "me:hunter2-hunter2"
    folder = bento_folder(tmp_path / "bento")
    error = await bench.refused(folder)
    assert error.reason in ("INDEX_REFUSED", "REQUIREMENT_NOT_FOUND"), error.message
    private = index.url.replace("http://", "http://me:hunter2-hunter2@")
    environment, _ = await bench.make(folder, UV_DEFAULT_INDEX=private)
    assert "hunter2" not in "\n".join(bench.lines)
    made = bench.environments.path(environment.digest)
    assert "hunter2" not in (made / "lock.txt").read_text() + (made / "complete.json").read_text()


async def test_a_variable_in_an_index_url_is_filled_in_from_the_secrets(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    index.credentials = "me:hunter2-hunter2"
    line = "--index-url " + index.url.replace("http://", "http://me:${PYPI_TOKEN}@")
    environment, _ = await bench.make(
        bento_folder(tmp_path / "bento", f"{line}\ntabulate\nbentoml==1.4.39\n"), PYPI_TOKEN="hunter2-hunter2"
    )
    assert bench.installed(environment)["tabulate"] == "0.10.0"


@pytest.mark.parametrize("by_variable", [True, False])
async def test_what_secrets_opened_is_for_their_organization_alone(
    bench: Bench, index: PackageIndex, tmp_path: Path, by_variable: bool
) -> None:
    index.credentials, index.max_age_s = "me:hunter2-hunter2", 600
    index.add("private", "1.0")
    private = index.url.replace("http://", "http://me:hunter2-hunter2@")
    line, env = "", {"UV_DEFAULT_INDEX": private}
    without = {"UV_DEFAULT_INDEX": index.url}
    if by_variable:
        line = "--index-url " + index.url.replace("http://", "http://me:${PYPI_TOKEN}@") + "\n"
        env, without = {"PYPI_TOKEN": "hunter2-hunter2"}, {}
    folder = bento_folder(tmp_path / "bento", f"{line}private==1.0\nbentoml==1.4.39\n")
    owners, _ = await bench.make(folder, organization="owners", **env)
    assert bench.installed(owners)["private"] == "1.0"
    asked = len(index.requests)
    assert await bench.make(folder, organization="owners", **env) == (owners, True)
    assert len(index.requests) == asked
    for organization in ("others", ""):
        with pytest.raises(EkibenError) as caught:
            await bench.make(folder, organization=organization, **without)
        assert caught.value.reason in ("INDEX_REFUSED", "REQUIREMENT_NOT_FOUND"), caught.value.message
    others, cached = await bench.make(folder, organization="others", **env)
    assert not cached and others.digest != owners.digest


async def test_what_no_secret_opened_is_shared_by_organizations(bench: Bench, tmp_path: Path) -> None:
    folder = bento_folder(tmp_path / "bento")
    made = [await bench.make(folder, organization=organization) for organization in ("one", "other")]
    assert [cached for _, cached in made] == [False, True]


async def test_an_environment_in_which_bentoml_cannot_be_imported_is_refused(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    index.add("bentoml", "1.4.38", code="raise ImportError('numpy is too new')\n")
    folder = bento_folder(tmp_path / "bento", "", manifest={"bentoml_version": "1.4.38"})
    error = await bench.refused(folder)
    assert error.reason == "ENVIRONMENT_BROKEN"
    assert "numpy is too new" in error.message


async def test_a_python_that_is_nowhere_is_named_with_what_there_is(bench: Bench, tmp_path: Path) -> None:
    error = await bench.refused(bento_folder(tmp_path / "bento", manifest={"image": {"python_version": "3.99"}}))
    assert error.reason == "PYTHON_NOT_FOUND"
    assert "3.99" in error.message
    assert "3.11" in error.message


async def test_another_patch_of_the_named_python_will_do(bench: Bench, tmp_path: Path) -> None:
    folder = bento_folder(tmp_path / "bento", manifest={"image": {"python_version": "3.11.999"}})
    environment, _ = await bench.make(folder)
    assert environment.python_version.startswith("3.11.")
    assert any("3.11.999 cannot be had" in line for line in bench.lines)


async def test_cancelling_ends_uv_and_leaves_no_environment(bench: Bench, index: PackageIndex, tmp_path: Path) -> None:
    index.held.clear()
    making = asyncio.ensure_future(bench.make(bento_folder(tmp_path / "bento")))
    await until(lambda: any(path.startswith("/files/") for path in index.requests))
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert bench.nothing_made()
    assert await bench.programs.end_strays() == 0
    index.held.set()
    assert not (await bench.make(bento_folder(tmp_path / "bento")))[1]


async def test_the_marker_says_what_is_there(bench: Bench, tmp_path: Path) -> None:
    environment, _ = await bench.make(bento_folder(tmp_path / "bento"))
    marker = json.loads((bench.environments.path(environment.digest) / "complete.json").read_text())
    assert marker["digest"] == environment.digest
    assert marker["package_count"] == 5


async def test_marker_says_what_replicas_can_export(bench: Bench, index: PackageIndex, tmp_path: Path) -> None:
    code = """
import sys, types
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "opentelemetry":
            raise TypeError("Descriptors cannot be created directly.")
sys.meta_path.insert(0, Finder)
sys.modules["bentoml._internal.monitoring.otlp"] = types.ModuleType("otlp")
"""
    index.add("bentoml", "1.4.39", ["attrs", "tabulate"], code)
    environment, _ = await bench.make(bento_folder(tmp_path / "bento"))
    marker = json.loads((bench.environments.path(environment.digest) / "complete.json").read_text())
    assert marker["exports"] == ["monitors"]
    assert any(line.startswith("WARNING: replicas send no traces: TypeError") for line in bench.lines)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is watched belongs to another thread
            await asyncio.sleep(0.02)
