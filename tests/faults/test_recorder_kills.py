"""A recorder that is killed, or whose disk is full, loses nothing that it answered for."""

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ekiben.errors import EkibenError, ResourceExhausted, Unavailable
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsStub
from services.recorder import messages
from tests.fixtures_recorder import Process, prediction, recorder_process

__all__ = ["recorder_process"]


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


async def test_a_killed_recorder_has_all_that_it_answered_for(recorder_process: Process) -> None:
    process = recorder_process
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
