"""Quotas as people meet them: the command, HTTP, and a push that does not fit."""

import re
from pathlib import Path

import pytest

from tests.platform import BentoMl, Platform


@pytest.fixture(autouse=True)
def lifted(platform: Platform) -> object:
    """Whatever a test sets, the others of this session have no limits."""
    yield
    platform.ekiben("quotas", "set", "--bytes", "none", "--versions", "none", "--repositories", "none")


def test_limits_are_set_shown_and_lifted(platform: Platform) -> None:
    shown = platform.ekiben("quotas", "set", "--bytes", "1.5TiB", "--versions", "100000").stdout
    assert "of 1.5 TiB" in shown and "of 100,000" in shown and "no limit" in shown
    quota = platform.ekiben_json("quotas", "get")
    assert quota["maxStoredBytes"] == str(3 << 39) and "maxRepositories" not in quota
    assert platform.api("GET", "/v1/organizations/-/quota").json() == quota
    path = "/v1/organizations/default/quota"
    lifted = platform.api("PATCH", f"{path}?updateMask=maxStoredBytes", {}).json()
    assert "maxStoredBytes" not in lifted and lifted["maxVersions"] == "100000"
    assert platform.api("PATCH", path, {"maxVersions": "-1"}).json()["reason"] == "QUOTA_INVALID"
    assert platform.ekiben("quota", "set", "--versions", "1.5", check=False).returncode == 2


def test_what_does_not_fit_is_refused_with_what_to_do(platform: Platform, bentoml: BentoMl, tmp_path: Path) -> None:
    count = int(platform.ekiben_json("quotas", "get").get("repositoryCount", 0))
    platform.ekiben("quotas", "set", "--repositories", str(count))
    refused = platform.api("POST", "/v1/modelRepositories", {"name": "modelRepositories/toomany"})
    assert (refused.status, refused.json()["reason"]) == (429, "QUOTA_EXCEEDED")
    assert f"keeps {count:,} repositories and may keep {count:,}" in refused.json()["detail"]
    platform.ekiben("quotas", "set", "--repositories", "none", "--bytes", "1000")
    store = Path(bentoml.env["BENTOML_HOME"]) / "models" / "toolarge" / "v1"
    store.mkdir(parents=True)
    (store / "model.yaml").write_text(
        "name: toolarge\nversion: v1\nmodule: ''\napi_version: v1\nlabels: {}\noptions: {}\nmetadata: {}\n"
        "context: {framework_name: '', framework_versions: {}, bentoml_version: 1.4.39, python_version: 3.11.7}\n"
        "signatures: {}\ncreation_time: '2026-01-02T03:04:05+00:00'\n"
    )
    (store / "weights").write_bytes(b"w" * 50_000)
    ours = platform.ekiben("models", "push", str(store), check=False)
    assert ours.returncode == 1 and "ekiben quotas set --bytes" in ours.stderr
    theirs = bentoml("models", "push", "toolarge:v1", check=False)
    assert "may keep 1,000" in re.sub(r"[\s│]+", " ", theirs.stdout + theirs.stderr)  # in a box, lines are broken
    platform.ekiben("quotas", "set", "--bytes", "none")
    bentoml("models", "push", "toolarge:v1")
    assert platform.ekiben_json("models", "get", "toolarge:v1")["content"]["state"] == "READY"
