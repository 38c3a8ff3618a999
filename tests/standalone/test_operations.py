"""Operations on the real thing: the commands, beside an `ekiben up` that runs and is written to."""

import asyncio
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import ekiben
from tests.platform import BIN, Platform, run, running, wait_for


def admin(platform: Platform, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """`ekiben admin`, where the platform is."""
    env = os.environ | {"EKIBEN_DATA": str(platform.data), "NO_COLOR": "1"}
    return run([str(BIN / "ekiben"), "admin", *arguments], env=env, check=check)


def model(folder: Path, version: str, content: bytes) -> Path:
    """A folder that is a model."""
    path = folder / version
    path.mkdir(parents=True)
    described = f"name: ops\nversion: {version}\nmodule: bentoml.sklearn\ncreation_time: '2026-01-01T00:00:00+00:00'\n"
    (path / "model.yaml").write_text(described)
    (path / "weights.bin").write_bytes(content)
    return path


def test_backup_restore_check_and_rotation_beside_a_platform_that_works(tmp_path: Path) -> None:
    vault, stop = tmp_path / "vault", threading.Event()
    pushed: list[str] = []
    with running(tmp_path / "data") as platform:

        async def push(*versions: str) -> None:
            async with ekiben.Client(platform.url, platform.token) as client:
                for version in versions:
                    if stop.is_set():
                        return
                    await client.models.push(model(tmp_path / "models", version, os.urandom(3 << 20)))
                    pushed.append(version)

        asyncio.run(push("v0", "v1", "v2"))
        platform.ekiben("secrets", "create", "hub", "--literal", "KEY=hidden")
        pushing = threading.Thread(target=lambda: asyncio.run(push(*(f"more{number}" for number in range(40)))))
        pushing.start()
        try:
            # Killed without a word while it copies; the next one goes on.
            env_here = os.environ | {"EKIBEN_DATA": str(platform.data)}
            killed = subprocess.Popen([BIN / "ekiben", "admin", "backup", vault], env=env_here, stderr=subprocess.PIPE)
            wait_for("bytes in the vault", lambda: list(vault.glob("blobs/sha256/*/*")), 60)
            killed.send_signal(signal.SIGKILL)
            killed.communicate()
            known = len(pushed)
            made = json.loads(admin(platform, "backup", str(vault), "--keep", "1", "-o", "json").stdout)
            assert made["snapshot"]["damaged"] == []
            rotated = json.loads(admin(platform, "rotate-keys", "-o", "json").stdout)
            assert (rotated["resealed"], rotated["failures"]) == (1, {})
        finally:
            stop.set()
            pushing.join()
        assert "0 errors, 0 warnings" in admin(platform, "fsck", "--deep").stdout
        admin(platform, "verify", str(vault), "--deep")
        refused = admin(platform, "restore", str(vault), "--overwrite", check=False)
        assert (refused.returncode, "is in use by process" in refused.stderr) == (2, True), refused.stderr
        key = platform.data / "registry" / "secrets.key"
        assert len(key.read_text().splitlines()) == 2
    restored = Platform(tmp_path / "restored")
    done = admin(restored, "restore", str(vault))
    assert "put the key file of the secrets" in done.stdout
    (restored.data / "registry" / "secrets.key").write_text(key.read_text())
    try:
        restored.start()
        models = restored.api("GET", "/v1/modelRepositories/-/models?pageSize=1000").json()["models"]
        # One that was being pushed has a row, and no bytes.
        whole = [found for found in models if found["content"]["state"] == "READY"]
        found = {found["name"].rpartition("/")[2] for found in whole}
        assert {"v0", "v1", "v2", *pushed[:known]} <= found
        assert len(found) == made["snapshot"]["blob_count"]
        restored.ekiben("models", "pull", "ops:v1", "--to", str(tmp_path / "pulled"))
        weights = (tmp_path / "models" / "v1" / "weights.bin").read_bytes()
        assert (tmp_path / "pulled" / "weights.bin").read_bytes() == weights
        assert "0 errors, 0 warnings" in admin(restored, "fsck", "--deep").stdout
        assert [s["name"] for s in restored.ekiben_json("secrets", "list")] == ["secrets/hub"]
    finally:
        restored.close()
