"""A disk without a byte left: traffic goes on, everything else says why it cannot, and all is well once there is room.

The whole data directory is a small file system of its own.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bentoml_clients import client
from tests.platform import BentoMl, Platform, http, process_tree_of, running, wait_for
from tests.standalone.load import Load

pytestmark = pytest.mark.timeout(400)

BENTOS = Path(__file__).resolve().parent.parent / "bentos"
HEADERS = {"content-type": "application/json"}


class SmallDisk:
    """A file system of 600 MiB that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(descriptor, b"x" * size)
        os.close(descriptor)

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def disk() -> Iterator[SmallDisk]:
    # A short path, so that the sockets and the shims' states lie on it too.
    folder = Path(tempfile.mkdtemp(prefix="ekfull-", dir="/tmp"))
    data = folder / "data"
    data.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=600m,mode=700", "tmpfs", str(data)]
    try:
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            yield SmallDisk(data)
        finally:
            subprocess.run(["umount", "-l", str(data)], check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def platform(disk: SmallDisk) -> Iterator[Platform]:
    with running(disk.folder) as up:
        try:
            yield up
        finally:
            disk.free()


@pytest.fixture(scope="module")
def bentoml(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> BentoMl:
    return BentoMl(client("1.4"), tmp_path_factory.mktemp("client")).login(platform)


@pytest.fixture(scope="module")
def url(platform: Platform, bentoml: BentoMl) -> str:
    """Of a deployment."""
    if not platform.ekiben_json("deployments", "list"):
        bentoml("deploy", ".", "--name", "versions", cwd=BENTOS / "versions", timeout_s=300)
    return str(platform.ekiben_json("deployments", "get", "versions")["urls"][0])


@pytest.fixture(scope="module")
def model(bentoml: BentoMl) -> str:
    """The tag of a model of 20 MB in the client's store."""
    script = (
        "import bentoml, os\n"
        "with bentoml.models.create('big') as m:\n"
        "    open(os.path.join(m.path, 'w.bin'), 'wb').write(os.urandom(20 << 20))\n"
        "print(m.tag)\n"
    )
    command = [bentoml.bin / "python", "-c", script]
    return subprocess.run(command, env=bentoml.env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def reserve(platform: Platform) -> None:
    """Once the platform has set aside what its next start may need."""
    wait_for("the reserve", (platform.data / "reserve").exists, 60)


def recorded(platform: Platform, url: str) -> bool:
    """Whether a prediction that is made now is found in the log."""
    trace = f"{time.time_ns():032x}"
    assert http("POST", f"{url}/version", b"{}", HEADERS | {"traceparent": f"00-{trace}-{1:016x}-01"}).status == 200
    wait_for("the prediction", lambda: platform.ekiben_json("predictions", "list", "--trace", trace), 5)
    return True


def lost_captures(platform: Platform) -> float:
    """Writes of captures that failed, as the metrics tell."""
    lines = http("GET", f"{platform.url}/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("ekiben_capture_write_failures_total"))


def test_a_build_on_a_disk_that_fills_up_goes_on_once_there_is_room(
    platform: Platform, bentoml: BentoMl, disk: SmallDisk
) -> None:
    # Returns once the build is asked for; resolving, fetching and installing are still to come.
    bentoml("deploy", ".", "--name", "versions", "--no-wait", cwd=BENTOS / "versions")
    disk.fill()

    def given_up() -> bool:
        # Its failure can be written down where uv gave back what it had unpacked, or where the database had room.
        (build,) = platform.ekiben_json("builds", "list")
        return "a build was left" in platform.output or "DISK_FULL" in json.dumps(build.get("failure"))

    wait_for("the build to be given up", given_up, 120)
    assert http("GET", f"{platform.url}/readyz").status == 200
    disk.free()
    wait_for(
        "the deployment", lambda: platform.ekiben_json("deployments", "get", "versions")["state"] == "RUNNING", 240
    )


def test_a_full_disk_stops_writes_with_a_reason_and_no_request(
    platform: Platform, bentoml: BentoMl, disk: SmallDisk, url: str, model: str
) -> None:
    assert recorded(platform, url)
    with Load(url, "/version", interval_s=0.02) as load:
        disk.fill()
        pushed = bentoml("models", "push", model, check=False)
        assert pushed.returncode != 0
        assert "full" in pushed.stdout + pushed.stderr
        updated = platform.ekiben("deployments", "update", "versions", "--env", "A=1", "--no-wait", check=False)
        assert "disk is full" in updated.stderr
        assert [one["state"] for one in platform.ekiben_json("deployments", "list")] == ["RUNNING"]
        assert platform.ekiben_json("models", "list") == []
        sent = load.count
        wait_for("more requests", lambda: load.count > sent + 50)
        wait_for("lost captures to be counted", lambda: lost_captures(platform) > 0)
        assert http("GET", f"{platform.url}/readyz").status == 200
    assert load.failures == []


def test_a_platform_killed_on_a_full_disk_goes_on_with_what_it_had(
    platform: Platform, disk: SmallDisk, url: str, reserve: None
) -> None:
    disk.fill()
    with Load(url, "/version", interval_s=0.02) as load:
        platform.kill()
        platform.start()
        sent = load.count
        wait_for("more requests", lambda: load.count > sent + 50)
    assert load.failures == []
    assert [one["state"] for one in platform.ekiben_json("deployments", "list")] == ["RUNNING"]


def test_captures_and_pushes_resume_once_there_is_room(
    platform: Platform, bentoml: BentoMl, disk: SmallDisk, url: str, model: str
) -> None:
    disk.free()
    wait_for("captures", lambda: recorded(platform, url), 40)
    bentoml("models", "push", model)
    (pushed,) = platform.ekiben_json("models", "list")
    assert pushed["content"]["state"] == "READY"
    platform.ekiben("deployments", "update", "versions", "--env", "A=1")
    assert platform.ekiben_json("deployments", "get", "versions")["servingRevision"].endswith("/2")


def test_a_full_disk_keeps_it_neither_from_ending_nor_from_starting(
    platform: Platform, disk: SmallDisk, url: str, reserve: None
) -> None:
    disk.fill()
    seen = len(platform.output)
    assert platform.stop(30) == 0
    assert not process_tree_of(str(platform.data))
    platform.start()
    assert "the room that is kept for it" in platform.output[seen:]
    assert "Traceback (most recent call last)" not in platform.output[seen:]
    disk.free()
    wait_for("predictions", lambda: http("POST", f"{url}/version", b"{}", HEADERS).status == 200, 120)
