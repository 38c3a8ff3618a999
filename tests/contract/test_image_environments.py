"""Environments for images, for this machine's platform and for another, by the real uv from an index of the test's own.

Bases are a few files: what says which Python and C library there are, nothing that runs.
"""

import asyncio
import base64
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import EkibenError, NotFound
from services.builder import bento
from services.builder.bases import look_into
from services.builder.buildah import BuildahEngine
from services.builder.bytecode import Compiler
from services.builder.image_builds import Source, Workshop, build_image
from services.builder.image_environments import ImageEnvironments
from services.builder.interpreters import Interpreters
from services.builder.locks import Locks, Work
from services.builder.platforms import here
from services.builder.recipe import make_recipe
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.content import open_images
from services.content.images import Descriptor, Platform
from services.content.images.layout import LayoutImageStore
from services.kernel.clock import SYSTEM
from tests.base_image import base_image
from tests.certificates import certificates
from tests.fixtures_builder import PackageIndex, bento_folder, index, wheel
from tests.fixtures_kernel import until
from tests.image_content import put_image
from tests.oci_registry import OciRegistry
from tests.shell_base import named_shell_base

HOME = "/root"
"""Of root, in an image."""

__all__ = ["index"]

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
MACHINE = os.uname().machine
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"app/.venv/lib/python{MINOR}/site-packages"


def platform_wheel(name: str, version: str, tag: str, files: dict[str, str]) -> bytes:
    """A wheel for one platform, with more files than its module."""
    out = io.BytesIO()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(io.BytesIO(wheel(name, version))) as pure, zipfile.ZipFile(out, "w") as archive:
        rows = pure.read(f"{info}/RECORD").decode().splitlines()
        for member in pure.namelist():
            if not member.endswith(("RECORD", "WHEEL")):
                archive.writestr(zipfile.ZipInfo(member), pure.read(member))
        rows = [row for row in rows if "WHEEL" not in row and "RECORD" not in row]
        files = {**files, f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n"}
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)
            rows.append(f"{path},sha256={digest64(text)},{len(text)}")
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")
    return out.getvalue()


def digest64(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def native(index: PackageIndex, name: str = "native", machines: Sequence[str] = ("x86_64", "aarch64")) -> None:
    """A package with a wheel for each machine, a command, a `.pth` file and a script of the old kind."""
    for machine in machines:
        tag = f"cp{MINOR.replace('.', '')}-cp{MINOR.replace('.', '')}-manylinux_2_28_{machine}"
        files = {
            f"{name}/_for.py": f"machine = {machine!r}\n",
            f"{name}/broken.py": "this is no Python\n",
            f"{name}-1.0.dist-info/entry_points.txt": f"[console_scripts]\n{name}-command = {name}:main\n",
            f"{name}-1.0.data/purelib/{name}.pth": f"import {name}\n",
            f"{name}-1.0.data/scripts/{name}-old": "#!python\nprint(1)\n",
        }
        index.files[f"{name}-1.0-{tag}.whl"] = platform_wheel(name, "1.0", tag, files)


async def put_base(layout: Path, *platforms: Platform) -> str:
    """A base that cannot run, with a Python and a C library to be found in it. Gives its name."""
    for platform in platforms or (AMD64, ARM64):
        machine = {"amd64": "x86_64", "arm64": "aarch64"}[platform.architecture]
        files = {
            "bin/bash": b"",
            f"usr/bin/python{MINOR}": b"",
            f"lib/{machine}-linux-gnu/libc.so.6": b"GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n",
            "var/lib/dpkg/status": f"Package: python{MINOR}-minimal\nVersion: {MINOR}.2-6\n\n".encode(),
        }
        await put_image(layout, "base", files, platform=platform)
    return f"oci:{layout}:base"


@dataclass
class Bench:
    """What builds images, with a cache of its own."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    builds: int = 0

    @property
    def layout(self) -> Path:
        return self.folder / "layout"

    async def build(
        self,
        bento_at: Path,
        base: str,
        platforms: Sequence[Platform] = (AMD64,),
        env: dict[str, str] | None = None,
        from_source: Sequence[str] = (),
        organization: str = "",
        **options: Any,
    ) -> Descriptor:
        cache = self.folder / "cache"
        self.builds += 1
        directory = cache / "tmp" / str(self.builds)
        directory.mkdir(parents=True)
        settings = Settings(database_url="", data_dir=cache, python_downloads=False)
        files = bento.read(bento_at)
        with tempfile.TemporaryDirectory(prefix="ekw") as run_dir:
            programs = Programs(cache, Path(run_dir))
            locks = Locks(cache, programs)
            interpreters = Interpreters(programs, settings, SYSTEM)
            engine = BuildahEngine(cache / "engine", programs)
            environments = ImageEnvironments(cache, programs, locks)
            async with open_images(f"oci:{self.layout}") as (into, _):
                return await build_image(
                    Source(bento_at, files, make_recipe(files), from_source=from_source),
                    platforms,
                    base=base,
                    into=into,
                    reference="v1",
                    workshop=Workshop(cache, environments, interpreters, engine),
                    work=Work(directory, self.lines.append, env=env or {}, organization=organization),
                    **options,
                )

    async def refused(self, *arguments: Any, **options: Any) -> EkibenError:
        with pytest.raises(EkibenError) as caught:
            await self.build(*arguments, **options)
        assert not (self.layout / "index.json").exists()
        return caught.value

    async def content(self, platform: Platform) -> dict[str, str | bytes]:
        """What the image's layers hold: path → content, or where a link leads."""
        _, image = await LayoutImageStore(self.layout).resolve("v1", platform)
        found: dict[str, str | bytes] = {}
        for layer in image.layers:
            with tarfile.open(self.layout / "blobs" / "sha256" / layer.digest.hex) as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    found[member.name] = member.linkname if member.issym() else file.read() if file else b""
        return found

    def everything(self) -> bytes:
        """All that was written, unpacked where it is packed, and all that was said."""
        parts = ["\n".join(self.lines).encode()]
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                parts.append(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        return b"\0".join(parts)


@pytest.fixture
def bench(tmp_path: Path, index: PackageIndex) -> Bench:
    return Bench(tmp_path / "bench")


def manifest(**more: Any) -> dict[str, Any]:
    image = {"base_image": f"python:{MINOR}-slim", "python_version": MINOR, "commands": [], "post_commands": []}
    return {"image": image, **more}


async def test_each_platform_gets_its_own_wheels_under_one_reference(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    native(index)
    folder = bento_folder(tmp_path / "bento", "native\nbentoml==1.4.39\n", manifest=manifest())
    base = await put_base(tmp_path / "bases")
    found = await bench.build(folder, base, [ARM64, AMD64])
    listed = json.loads((bench.layout / "blobs" / "sha256" / found.digest.hex).read_bytes())
    assert [each["platform"]["architecture"] for each in listed["manifests"]] == ["amd64", "arm64"]
    for platform, machine in ((AMD64, "x86_64"), (ARM64, "aarch64")):
        inside = await bench.content(platform)
        assert inside[f"{SITE}/native/_for.py"] == f"machine = {machine!r}\n".encode()
        assert inside["app/.venv/bin/python"] == f"/usr/bin/python{MINOR}"
        assert inside["app/.venv/bin/python3"] == inside[f"app/.venv/bin/python{MINOR}"] == "python"
        assert f"version_info = {MINOR}.2\n".encode() in bytes(inside["app/.venv/pyvenv.cfg"])  # type: ignore[arg-type]
        assert b"home = /usr/bin\n" in bytes(inside["app/.venv/pyvenv.cfg"])  # type: ignore[arg-type]
        for script in ("native-command", "native-old"):
            text = inside[f"app/.venv/bin/{script}"]
            assert isinstance(text, bytes) and text.startswith(b"#!/bin/sh\n") and b"'python'" in text
        assert inside[f"{SITE}/native.pth"] == b"import native\n"
        tag = f"cpython-{MINOR.replace('.', '')}"
        compiled = inside[f"{SITE}/native/__pycache__/_for.{tag}.pyc"]
        assert isinstance(compiled, bytes) and f"/{SITE}/native/_for.py".encode() in compiled
        assert f"{SITE}/native/__pycache__/broken.{tag}.pyc" not in inside
        assert str(bench.folder).encode() not in b"".join(x for x in inside.values() if isinstance(x, bytes))
    again = await bench.build(folder, base, [AMD64, ARM64])
    assert again.digest == found.digest
    alone = await bench.build(folder, base, [ARM64])
    assert str(alone.digest) == listed["manifests"][1]["digest"]


async def test_nothing_of_a_bento_or_of_a_package_is_left_out_for_its_name(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    names = ("complete.json", ".gitignore", "pyvenv.cfg", ".lock", "CACHEDIR.TAG", "bin/activate.csh")
    index.files["named-1.0-py3-none-any.whl"] = platform_wheel(
        "named", "1.0", "py3-none-any", {f"named/{name}": name for name in names}
    )
    base = await put_base(tmp_path / "bases", AMD64)
    digests = set()
    for number in ("1", "2"):
        sources = {"src/models/net.py": number.encode(), "src/own/models/__init__.py": b"", "models/no.bin": b"other"}
        folder = bento_folder(tmp_path / number, "named\nbentoml==1.4.39\n", manifest=manifest(), files=sources)
        digests.add((await bench.build(folder, base)).digest)
        inside = await bench.content(AMD64)
        assert inside["home/bentoml/bento/src/models/net.py"] == number.encode()
        assert "home/bentoml/bento/src/own/models/__init__.py" in inside
        assert "home/bentoml/bento/models/no.bin" not in inside, "models have layers of their own"
        assert [inside.get(f"{SITE}/named/{name}") for name in names] == [name.encode() for name in names]
    assert len(digests) == 2
    made = {name for name in inside if name.count("/") == 2 and name.startswith("app/.venv/")}
    assert made == {"app/.venv/bin", "app/.venv/lib", "app/.venv/lib64", "app/.venv/pyvenv.cfg"}


async def test_equal_bentos_with_wheels_of_their_own_give_one_digest_on_any_machine(
    index: PackageIndex, tmp_path: Path
) -> None:
    wheels = {"env/python/wheels/own-1.0-py3-none-any.whl": wheel("own", "1.0")}
    base = await put_base(tmp_path / "bases", AMD64)
    digests = set()
    for number in ("1", "a machine with another name"):
        folder = bento_folder(tmp_path / number / "bento", manifest=manifest(), files=wheels)
        bench = Bench(tmp_path / number / "bench")
        digests.add((await bench.build(folder, base)).digest)
        inside = await bench.content(AMD64)
        info = f"{SITE}/own-1.0.dist-info"
        assert f"{info}/METADATA" in inside and f"{info}/direct_url.json" not in inside
        assert b"direct_url" not in bytes(inside[f"{info}/RECORD"])  # type: ignore[arg-type]
    assert len(digests) == 1
    # The lock is known and each wheel is there: the index may be away.
    shutil.rmtree(bench.folder / "cache" / "image-environments")
    shutil.rmtree(bench.layout)
    index.broken = True
    assert {(await bench.build(folder, base)).digest} == digests


async def test_a_build_that_ends_in_its_middle_leaves_nothing_that_counts(
    bench: Bench, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bento_folder(tmp_path / "bento", manifest=manifest())
    base = await put_base(tmp_path / "bases")
    undisturbed = await bench.build(folder, base, [AMD64, ARM64])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in (
        "compilers._started",
        "bytecode.Bytecode._run",
        "image_environments._finish",
        "image_environments.sync_folder",
        "images.index_of",
    ):
        shutil.rmtree(bench.layout)
        for made in ("image-environments", "pythons-of-bases", "bytecode", "layers", "bases"):
            shutil.rmtree(bench.folder / "cache" / made)
        with monkeypatch.context() as patched:
            patched.setattr(f"services.builder.{step}", full)
            with pytest.raises((OSError, EkibenError)):
                await bench.build(folder, base, [AMD64, ARM64])
        assert not (bench.layout / "index.json").exists()
        assert (await bench.build(folder, base, [AMD64, ARM64])).digest == undisturbed.digest


async def test_a_cancelled_build_leaves_nothing_that_compiles(
    bench: Bench, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "pid"
    script = tmp_path / "slow.sh"
    script.write_text(f"echo $$ > {started}.new; mv {started}.new {started}; exec sleep 40\n")

    async def slow(*_: Any) -> Compiler:
        return Compiler(["/bin/sh", str(script)], f"{MINOR}.98")

    monkeypatch.setattr("services.builder.compilers.find", slow)
    folder = bento_folder(tmp_path / "bento", manifest=manifest())
    building = asyncio.ensure_future(bench.build(folder, await put_base(tmp_path / "bases")))
    await until(started.exists, "modules are compiled", 60)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    await until(lambda: not Path(f"/proc/{started.read_text().strip()}").exists(), "the compiler ends")


async def test_versions_stay_the_same_for_each_platform_where_nothing_fixes_them(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    native(index)
    native(index, "onlyamd", ["x86_64"])
    folder = bento_folder(tmp_path / "bento", "tabulate\nbentoml==1.4.39\n", manifest=manifest())
    base = await put_base(tmp_path / "bases")
    del index.files["tabulate-0.10.0-py3-none-any.whl"]
    await bench.build(folder, base, [AMD64])
    index.add("tabulate", "0.10.0")
    await bench.build(folder, base, [AMD64, ARM64])
    assert f"{SITE}/tabulate-0.9.0.dist-info/METADATA" in await bench.content(ARM64)


async def test_a_package_without_a_wheel_for_the_platform_is_named(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    native(index, machines=["x86_64"])
    index.add_source("sourced", "1.0", "raise SystemExit('must not run')")
    base = await put_base(tmp_path / "bases")
    folder = bento_folder(tmp_path / "1", "native\nbentoml==1.4.39\n", manifest=manifest())
    error = await bench.refused(folder, base, [AMD64, ARM64])
    assert (error.reason, error.metadata["requirement"]) == ("WHEEL_NOT_FOUND", "native")
    assert "linux/arm64" in error.message and "manylinux_2_28_x86_64" in error.message
    folder = bento_folder(tmp_path / "2", "sourced\nbentoml==1.4.39\n", manifest=manifest())
    error = await bench.refused(folder, base)
    assert (error.reason, error.metadata["requirement"]) == ("WHEEL_NOT_FOUND", "sourced")
    project = '[build-system]\nrequires = []\nbuild-backend = "own"\n[project]\nname = "mine"\nversion = "1.0"\n'
    files = {"src/mine/pyproject.toml": project.encode()}
    folder = bento_folder(tmp_path / "3", "mine @ ./mine\nbentoml==1.4.39\n", manifest=manifest(), files=files)
    error = await bench.refused(folder, base)
    assert (error.reason, error.metadata["requirement"]) == ("WHEEL_NOT_FOUND", "mine"), error.message
    assert "must not run" not in "\n".join(bench.lines)


async def test_a_wheel_whose_hash_is_not_the_locks_is_refused(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    folder = bento_folder(tmp_path / "bento", manifest=manifest())
    base = await put_base(tmp_path / "bases", AMD64)
    wanted = hashlib.sha256(b"another file").hexdigest()
    (folder / "env/python/requirements.lock.txt").write_text(
        f"tabulate==0.9.0 --hash=sha256:{wanted}\nbentoml==1.4.39\n"
    )
    error = await bench.refused(folder, base)
    assert error.reason == "REQUIREMENT_HASH_MISMATCH" and "tabulate" in error.message
    # The lock was made with the index's hash; what the index gives then is something else.
    other = bento_folder(tmp_path / "other", "tabulate==0.10.0\nbentoml==1.4.39\n", manifest=manifest())
    good = index.files["tabulate-0.10.0-py3-none-any.whl"]
    page = index.page("tabulate")
    index.files["tabulate-0.10.0-py3-none-any.whl"] = wheel("tabulate", "0.10.0", code="stolen = 1\n")
    index.page = lambda project: page if project == "tabulate" else PackageIndex.page(index, project)  # type: ignore[method-assign]
    error = await bench.refused(other, base)
    assert error.reason == "REQUIREMENT_HASH_MISMATCH", error.message
    assert error.metadata["requirement"] == "tabulate==0.10.0"
    index.files["tabulate-0.10.0-py3-none-any.whl"] = good
    await bench.build(other, base)


async def test_modules_for_another_platform_are_compiled_as_that_platform_would(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(base_image().partition(":")[2], tmp_path / "bases"))
    other = ARM64 if MACHINE == "x86_64" else AMD64
    store = LayoutImageStore(own)
    _, image = await store.resolve("bookworm", here())
    told = (await look_into(image, store, tmp_path / "looked")).python("3.11", "base").version
    files = {
        "bin/bash": b"",
        "usr/bin/python3.11": b"",
        "var/lib/dpkg/status": f"Package: python3.11-minimal\nVersion: {told}-1\n\n".encode(),
    }
    await put_image(own, "bookworm", files, platform=other)
    of_bento = {"image": {"base_image": "python:3.11-slim", "python_version": "3.11"}}
    folder = bento_folder(tmp_path / "bento", manifest=of_bento)
    await bench.build(folder, f"oci:{own}:bookworm", [AMD64, ARM64])
    compiled = []
    for platform in (AMD64, ARM64):
        inside = await bench.content(platform)
        compiled.append({name: data for name, data in inside.items() if re.fullmatch(r"app/.*\.pyc", name)})
    assert compiled[0] == compiled[1] and len(compiled[0]) >= 3
    known = (bench.folder / "cache" / "pythons-of-bases").glob("*/compiler.json")
    assert {json.loads(each.read_text())["version"] for each in known} == {told, ""}  # its own, and what cannot run


BACKEND = """
import os, sys, zipfile
print("building with", sys.version)
def build_wheel(folder, settings=None, metadata=None):
    if os.path.exists("/ekiben") and "{fail}":
        sys.exit("no header for {fail}")
    trusted = "".join("# " + line for line in open(os.environ["SSL_CERT_FILE"]))
    tag = "cp%d%d-cp%d%d-linux_x86_64" % (sys.version_info[:2] * 2)
    info = "sourced-1.0.dist-info"
    name = "sourced-1.0-" + tag + ".whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as file:
        file.writestr("sourced/__init__.py", "built = %r\\n%s" % (sys.prefix, trusted))
        file.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: sourced\\nVersion: 1.0\\n")
        file.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: false\\nTag: %s\\n" % tag)
        file.writestr(info + "/RECORD", "sourced/__init__.py,,\\n")
    return name
"""


@pytest.mark.skipif(MACHINE != "x86_64", reason="the wheel is one of x86_64")
async def test_a_named_package_is_built_from_source_in_the_base_and_only_once(
    bench: Bench, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed (Debian: apt-get install buildah)")
    base = base_image()
    certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))  # what is trusted here is trusted there
    index.credentials = "me:hunter2-hunter2"
    private = {"UV_DEFAULT_INDEX": index.url.replace("http://", "http://me:hunter2-hunter2@")}
    index.add_source("sourced", "1.0", BACKEND.replace("{fail}", "zlib.h"))
    of_bento = {"image": {"base_image": "python:3.11-slim", "python_version": "3.11"}}
    folder = bento_folder(tmp_path / "bento", "sourced\nbentoml==1.4.39\n", manifest=of_bento)
    error = await bench.refused(folder, base, env=private, from_source=["Sourced"])
    assert error.reason == "SOURCE_BUILD_FAILED" and "no header for zlib.h" in error.message, error.message
    index.add_source("sourced", "1.0", BACKEND.replace("{fail}", ""))
    (folder / "env/python/requirements.txt").write_text("--no-binary sourced\nsourced\nbentoml==1.4.39\n")
    shutil.rmtree(bench.folder / "cache" / "locks")
    first = await bench.build(folder, base, env=private)
    site = "app/.venv/lib/python3.11/site-packages"
    module = (await bench.content(AMD64))[f"{site}/sourced/__init__.py"]
    assert isinstance(module, bytes) and module.startswith(b"built = '/ekiben/")
    assert module.decode().endswith((tmp_path / "ca.pem").read_text().splitlines()[-1] + "\n")
    said = len(bench.lines)
    assert (await bench.build(folder, base, env=private)).digest == first.digest
    assert not [line for line in bench.lines[said:] if "from source" in line]
    assert b"hunter2" not in bench.everything()


@pytest.mark.parametrize("way", ["variable", "setting", "netrc"])
async def test_credentials_of_a_private_index_are_in_no_layer_log_or_file(
    bench: Bench, index: PackageIndex, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.credentials = "me:hunter2-hunter2"
    host = index.url.removeprefix("http://")
    lines, env = "", {}
    if way == "variable":
        lines, env = f"--index-url http://me:${{PYPI_TOKEN}}@{host}\n", {"PYPI_TOKEN": "hunter2-hunter2"}
    elif way == "setting":
        env = {"UV_DEFAULT_INDEX": f"http://me:hunter2-hunter2@{host}"}
    else:
        netrc = tmp_path / "netrc"
        netrc.write_text(f"machine {host.partition(':')[0]} login me password hunter2-hunter2\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
    requirements = f"{lines}tabulate\nbentoml==1.4.39\n"
    folder = bento_folder(tmp_path / "bento", requirements, manifest=manifest())
    await bench.build(folder, await put_base(tmp_path / "bases", AMD64), env=env)
    assert f"{SITE}/tabulate/__init__.py" in await bench.content(AMD64)
    assert b"hunter2" not in bench.everything()


async def test_an_image_gets_no_packages_that_another_organizations_secret_opened(
    bench: Bench, index: PackageIndex, tmp_path: Path
) -> None:
    index.credentials = "me:hunter2-hunter2"
    index.add("private", "1.0")
    lines = (
        f"--index-url http://me:${{PYPI_TOKEN}}@{index.url.removeprefix('http://')}\nprivate==1.0\nbentoml==1.4.39\n"
    )
    folder = bento_folder(tmp_path / "bento", lines, manifest=manifest())
    base = await put_base(tmp_path / "bases", AMD64)
    await bench.build(folder, base, env={"PYPI_TOKEN": "hunter2-hunter2"}, organization="owners")
    assert f"{SITE}/private/__init__.py" in await bench.content(AMD64)
    shutil.rmtree(bench.layout)
    error = await bench.refused(folder, base, organization="others")
    assert error.reason in ("INDEX_REFUSED", "REQUIREMENT_NOT_FOUND"), error.message


async def push(layout: Path, name: str) -> None:
    """Put the base of a layout into a registry."""
    source = LayoutImageStore(layout)
    async with open_images(name) as (into, reference):
        descriptor, image = await source.resolve("base", AMD64)
        raw = b"".join([chunk async for chunk in source.read(descriptor)])
        for each in (Descriptor.from_json(json.loads(raw)["config"]), *image.layers):
            await into.write(source.read(each))
        await into.tag(reference, raw, descriptor.media_type, AMD64)


async def test_nothing_of_a_base_that_a_bento_names_is_started_here(
    bench: Bench, index: PackageIndex, tmp_path: Path, oci_registry: OciRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{oci_registry.host}/{oci_registry.new_repository()}:{MINOR}"
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    await put_base(tmp_path / "bases", AMD64)
    await push(tmp_path / "bases", f"docker://{name}")
    started: list[Path] = []
    monkeypatch.setattr("services.builder.compilers._started", lambda folder, _: started.append(folder))
    of_bento = {"image": {"base_image": name, "python_version": MINOR}}
    folder = bento_folder(tmp_path / "bento", manifest=of_bento)
    await bench.build(folder, f"oci:{tmp_path}/none:{{python}}")
    assert not started
    assert [path for path in await bench.content(AMD64) if path.endswith(".pyc")]
    shutil.rmtree(bench.layout)
    await bench.build(folder, f"docker://{name}")
    assert len(started) == 1


@pytest.mark.skipif(MACHINE != "x86_64", reason="the base is one of x86_64")
async def test_an_old_bento_of_another_distribution_is_built_on_it(
    bench: Bench, index: PackageIndex, tmp_path: Path, oci_registry: OciRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("buildah") is None or os.getuid() != 0:
        pytest.skip("what the bento's Dockerfile does is done by buildah, as root")
    name = f"{oci_registry.host}/{oci_registry.new_repository()}:{MINOR}-alpine"
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    musl = dict.fromkeys(("bin/bash", f"usr/local/bin/python{MINOR}", "lib/ld-musl-x86_64.so.1"), b"")
    await put_image(tmp_path / "bases", "base", {**musl, "etc/alpine-release": b"3.19.1\n"}, platform=AMD64)
    await push(tmp_path / "bases", f"docker://{name}")
    lines = (
        f"FROM {name} as base-container",
        f"ENV ENV {HOME}/.bashrc",
        "COPY ./env/python ./env/python/",
        "COPY . ./",
    )
    dockerfile = "\n".join([*lines, "EXPOSE 3000", "USER bentoml", ""]).encode()
    docker = {"distro": "alpine", "python_version": MINOR}
    folder = bento_folder(
        tmp_path / "bento",
        manifest={"image": None, "docker": docker, "spec": 1},
        files={"env/docker/Dockerfile": dockerfile},
    )
    await put_base(tmp_path / f"debian-{MINOR}", AMD64)
    await bench.build(folder, f"oci:{tmp_path}/debian-{{python}}:base")
    inside = await bench.content(AMD64)
    assert "etc/alpine-release" in inside and "var/lib/dpkg/status" not in inside
    assert any("musl" in line for line in bench.lines), bench.lines
    _, image = await LayoutImageStore(bench.layout).resolve("v1", AMD64)
    assert f"ENV={HOME}/.bashrc" in image.config["config"]["Env"]


def test_nothing_that_commands_left_is_started_here(bench: Bench, index: PackageIndex, tmp_path: Path) -> None:
    base = named_shell_base(tmp_path / "shell")
    ran = tmp_path / "ran"
    script = f"#!/bin/sh\\n: > {ran}\\necho cpython 3.11.98\\n"
    loader = "/lib64/ld-linux-0.so.2"
    command = f"mkdir -p /lib64; printf '{script}' > {loader}; chmod 755 {loader}"
    of_bento = {"image": {"base_image": "x", "python_version": "3.11", "commands": [command], "post_commands": []}}
    asyncio.run(bench.build(bento_folder(tmp_path / "bento", manifest=of_bento), base))
    assert "3.11.98" not in "".join(each.read_text() for each in bench.folder.rglob("compiler.json"))
    assert not ran.exists()


async def test_what_a_base_is_called_in_a_registry_is_asked_once(
    bench: Bench, index: PackageIndex, tmp_path: Path, oci_registry: OciRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"docker://{oci_registry.host}/{oci_registry.new_repository()}:{MINOR}"
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    folder = bento_folder(tmp_path / "bento", manifest=manifest())
    await put_base(tmp_path / "one", AMD64)
    await push(tmp_path / "one", name)
    rule = name.replace(f":{MINOR}", ":{python}")
    made = await bench.build(folder, rule)
    await put_image(tmp_path / "two", "base", {"other": b""}, platform=AMD64)
    await push(tmp_path / "two", name)
    assert (await bench.build(folder, rule)).digest == made.digest
    with pytest.raises(EkibenError, match="has no Python"):
        await bench.build(folder, rule, refresh_base=True)
    pins = bench.folder / "cache" / "bases" / "pins.json"
    known = json.loads(pins.read_text())
    for pin in known.values():
        pin["digest"] = f"sha256:{'0' * 64}"
    pins.write_text(json.dumps(known))
    with pytest.raises(NotFound, match="--refresh-base"):
        await bench.build(folder, rule)
