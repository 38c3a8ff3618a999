"""Push and pull of a large model with its bytes on S3, presigned and proxied, beside the bare S3 client.

    python -m benchmarks.registry.transfer --gib 10 --rounds 3

The peer is boto3's TransferManager with the same part size and as many connections, configured as lean as it goes: no
checksum of its own, no signed payload. It sends one file and hashes nothing; a push also packs, hashes at both ends, and
has the registry read the whole back before anybody sees it. So the time until the last byte is sent stands beside the whole.
"""

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Table, cpu_of, cpu_s, descendants, rss_mib
from benchmarks.transfer import Peak
from ekiben import ranges, uploading
from ekiben.client import Client
from tests.platform import Platform
from tests.s3 import S3Server, run_s3

MIB = 1 << 20
WHAT = ("push presigned", "sent", "pull presigned", "push proxied", "pull proxied", "put", "get")


def make(folder: Path, name: str, size: int) -> Path:
    """A model whose bytes nobody has seen."""
    path = folder / name
    path.mkdir()
    (path / "model.yaml").write_text(f"name: {name}\nversion: v1\nmodule: ''\napi_version: v1\n")
    block = os.urandom(1 << 24)
    with (path / "weights.bin").open("wb") as file:
        for number in range(size >> 24):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path


class Figures:
    """Seconds of wall and CPU, by what took them."""

    def __init__(self, size: int, s3: S3Server) -> None:
        self.size, self.s3 = size, s3
        self.speed: dict[str, list[float]] = {what: [] for what in WHAT}
        self.cpu: dict[str, list[float]] = {what: [] for what in WHAT}
        self.grown: dict[str, list[float]] = {"presigned": [], "proxied": []}

    def measure(self, what: str, action: Any, pid: int = 0) -> None:
        """One run; its CPU is the client's and the platform's, not the object store's."""
        wall_s, used_s = cpu_of(action, pid)
        self.speed[what].append(self.size / wall_s / MIB)
        self.cpu[what].append(used_s)


def bare(figures: Figures, path: Path, home: Path) -> None:
    """The bare client: put one file, get it."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    lean = Config(
        signature_version="s3v4",
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path", "payload_signing_enabled": False},
    )
    client = boto3.client("s3", endpoint_url=figures.s3.endpoint, region_name="us-east-1", config=lean)
    bucket, source, copy = figures.s3.new_bucket(), path / "weights.bin", home / "copy"

    def transfer(part_bytes: int) -> Any:
        return TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=part_bytes,
            max_concurrency=uploading.PARALLEL_PARTS,
            preferred_transfer_client="classic",
        )

    figures.measure("put", lambda: client.upload_file(str(source), bucket, "k", Config=transfer(uploading.PART_BYTES)))
    figures.measure("get", lambda: client.download_file(bucket, "k", str(copy), Config=transfer(ranges.RANGE_BYTES)))
    copy.unlink()
    client.delete_object(Bucket=bucket, Key="k")


def through_ekiben(figures: Figures, how: str, platform: Platform, path: Path, home: Path) -> None:
    """Push and pull by our client."""
    assert platform.process is not None
    pid = platform.process.pid
    name = f"modelRepositories/{path.name}/models/v1"
    sent_at = [0.0]

    async def push() -> None:
        passed, begun = 0, time.perf_counter()

        def progress(count: int) -> None:
            nonlocal passed
            passed += count
            sent_at[0] = time.perf_counter() - begun

        async with Client(platform.url, platform.token) as client:
            await client.models.push(path, progress=progress)

    async def pull() -> None:
        async with Client(platform.url, platform.token) as client:
            await client.models.pull(name, home / "pulled.tar", unpack=False)

    before, peak = rss_mib(descendants(pid)), Peak(pid)
    figures.measure(f"push {how}", lambda: asyncio.run(push()), pid)
    if how == "presigned":
        figures.speed["sent"].append(figures.size / sent_at[0] / MIB)
    wait_until_idle(pid)
    figures.measure(f"pull {how}", lambda: asyncio.run(pull()), pid)
    figures.grown[how].append(peak.stop() - before)
    (home / "pulled.tar").unlink()


def wait_until_idle(pid: int) -> None:
    """Until the registry has listed the files of what was pushed, which is not what is measured."""
    used = -1.0
    while (now := cpu_s(descendants(pid))) - used > 0.05:
        used = now
        time.sleep(0.5)


def run(rounds: int, gib: float = 1.0) -> None:
    """Each round with a new content, the ways in turn."""
    size = max(1, round(gib * 64)) << 24
    with tempfile.TemporaryDirectory() as folder, run_s3() as s3:
        os.environ.update(s3.environment)
        home, figures = Path(folder), Figures(size, s3)
        platforms: dict[str, Platform] = {}
        try:
            for how, direct in (("presigned", "true"), ("proxied", "false")):
                env = {"EKIBEN_REGISTRY_BLOBS_URL": s3.new_url(), "EKIBEN_REGISTRY_BLOBS_DIRECT": direct}
                platforms[how] = Platform(home / how, env=env)
                platforms[how].start()
            for index in range(rounds):
                path = make(home, f"bench{index}", size)
                bare(figures, path, home)
                for how, platform in platforms.items():
                    through_ekiben(figures, how, platform, path, home)
                shutil.rmtree(path)
        finally:
            for platform in platforms.values():
                platform.close()
    report(figures, gib)


def report(figures: Figures, gib: float) -> None:
    """Print the table."""
    table = Table(f"Transfer of a {gib:g} GiB model to S3 (versitygw)")
    speed, cpu = figures.speed, figures.cpu
    peers = {"push": ("put", "boto3, put"), "pull": ("get", "boto3, get")}
    table.add("push presigned, until all is sent (target: 0.95)", speed["sent"], speed["put"], "MiB/s", "boto3, put")
    for verb, (peer, name) in peers.items():
        for how, target in (("presigned", 0.95), ("proxied", 0.7)):
            what = f"{verb} {how}"
            table.add(f"{what} (target: {target})", speed[what], speed[peer], "MiB/s", name)
            table.add(f"{what}, CPU of client and platform", cpu[what], cpu[peer], "s", f"{name}, its own CPU")
    for how, grown in figures.grown.items():
        table.note(f"memory that the platform grew by, {how}", f"{max(grown):.0f} MiB")
    table.print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model; a tenth takes a minute in all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts")
    given = parser.parse_args()
    run(given.rounds, given.gib)
