"""A recorder that is killed, or whose disk is full, loses nothing that it answered for."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ekiben.channel import open_channel
from ekiben.errors import EkibenError, ResourceExhausted, Unavailable
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsStub
from services.recorder import messages
from tests.fixtures_recorder import prediction


class Process:
    """`python -m services.recorder` with its data in `folder`."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.address = f"unix:{run_dir}/grpc"
        token_file = run_dir / "service-token"
        token_file.write_text("eks_test")
        self._log = run_dir / "log"
        self._env = {
            **os.environ,
            "EKIBEN_RECORDER_DATABASE_URL": f"sqlite:///{folder}/recorder.db",
            "EKIBEN_RECORDER_MIN_FREE_BYTES": "0",
            "EKIBEN_SERVER_LISTEN": self.address,
            "EKIBEN_SERVER_SERVICE_TOKEN_FILE": str(token_file),
            "EKIBEN_PEERS_SERVICE_TOKEN_FILE": str(token_file),
            "EKIBEN_PEERS_REGISTRY": f"unix:{run_dir}/nobody",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may not listen yet."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "services.recorder"], env=self._env, stderr=log)

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and wait for its end; its exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(how)
        code = self._process.wait(30)
        self._process = None
        return code

    @asynccontextmanager
    async def predictions(self) -> AsyncIterator["PredictionsStub"]:
        """A stub, as a service of the suite; calls wait for the process to listen."""
        async with open_channel(self.address, token="eks_test", wait_for_ready=True, timeout_s=30) as channel:
            yield PredictionsStub(channel)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    with tempfile.TemporaryDirectory(prefix="ekr-", dir="/tmp") as run_dir:
        process = Process(tmp_path, Path(run_dir))
        yield process
        process.end()


def batch(first: int, size: int) -> pb.RecordPredictionsRequest:
    numbers = range(first, first + size)
    return pb.RecordPredictionsRequest(
        predictions=[messages.prediction_to_proto(prediction(number), bodies=True) for number in numbers]
    )


async def every_name(stub: PredictionsStub) -> list[str]:
    names: list[str] = []
    request = pb.ListPredictionsRequest(page_size=1000)
    while True:
        page: pb.ListPredictionsResponse = await stub.ListPredictions(request)  # type: ignore[misc]
        names += [each.name for each in page.predictions]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            return names


async def test_a_killed_recorder_has_all_that_it_answered_for(process: Process) -> None:
    answered = sent = 0
    for round_ in range(3):
        process.start()
        async with process.predictions() as stub:
            await stub.RecordPredictions(batch(answered, 10), wait_for_ready=True)  # type: ignore[misc]
            answered += 10
            killing = asyncio.get_running_loop().call_later(0.1 + 0.05 * round_, process.end)
            try:
                while True:
                    sent = answered + 10
                    await stub.RecordPredictions(batch(answered, 10), wait_for_ready=False, timeout=5)  # type: ignore[misc]
                    answered = sent
            except EkibenError:
                killing.cancel()
    process.start()
    async with process.predictions() as stub:
        names = await every_name(stub)
        assert len(names) == len(set(names))
        assert set(names) >= {f"predictions/p{number}" for number in range(answered)}
        assert len(names) <= sent
        # Whoever got no answer sends the same again.
        await stub.RecordPredictions(batch(answered, 10))  # type: ignore[misc]
        assert sorted(await every_name(stub)) == sorted(f"predictions/p{number}" for number in range(sent))
    assert process.end(signal.SIGTERM) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


async def test_a_full_disk_is_told_and_passes(small_disk: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ekr-", dir="/tmp") as run_dir:
        process = Process(small_disk, Path(run_dir))
        process.start()
        try:
            async with process.predictions() as stub:
                await stub.RecordPredictions(batch(0, 10))  # type: ignore[misc]
                large = batch(10, 20)
                for each in large.predictions:
                    each.request.body = os.urandom(100_000)
                ballast = small_disk / "ballast"
                free = os.statvfs(small_disk)
                ballast.write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - 200_000))
                for _ in range(3):
                    with pytest.raises((ResourceExhausted, Unavailable)):
                        await stub.RecordPredictions(large)  # type: ignore[misc]
                assert len(await every_name(stub)) == 10
                ballast.unlink()
                await stub.RecordPredictions(large)  # type: ignore[misc]
                assert len(await every_name(stub)) == 30
            assert process.end(signal.SIGTERM) == 0
        finally:
            process.end()
