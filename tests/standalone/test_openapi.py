"""The HTTP/JSON API against its own description: /openapi.json, and requests that schemathesis makes of it."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.platform import BIN, Platform, running


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Platform:  # type: ignore[misc]
    """A platform of its own: what is made up here shall not be in the lists of other tests."""
    with running(tmp_path_factory.mktemp("fuzzed") / "data") as up:
        yield up


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_made_up_request_breaks_the_server_or_its_description(fuzzed: Platform, tmp_path: Path) -> None:
    import subprocess

    command = [
        *(str(BIN / "schemathesis"), "run", f"{fuzzed.url}/openapi.json", "--url", fuzzed.url),
        *("--header", f"authorization: Bearer {fuzzed.token}"),
        # A stream does not end, and the requests here wait for the end.
        *("--exclude-path-regex", ":(watch|tail|log|logs)$"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "8", "--max-time", "75"),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
        *("--checks", "response_headers_conformance,response_schema_conformance"),
        *("--continue-on-failure", "--generation-deterministic", "--no-color", "--warnings", "off"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=380)
    shutil.rmtree(tmp_path / ".schemathesis", ignore_errors=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert fuzzed.api("GET", "/readyz").status == 200


def test_every_public_method_is_described_once(fuzzed: Platform) -> None:
    from services.gateway.bindings import read_bindings

    described = fuzzed.api("GET", "/openapi.json").json()
    operations = [it["operationId"] for verbs in described["paths"].values() for it in verbs.values()]
    public = {f"{b.method.containing_service.name}_{b.method.name}" for b in read_bindings()}
    assert len(operations) == len(set(operations)) == len(list(read_bindings()))
    assert {re.sub(r"_[0-9]+$", "", operation) for operation in operations} == public
    assert described["openapi"].startswith("3.1")
