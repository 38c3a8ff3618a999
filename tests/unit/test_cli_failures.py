"""What a command says when it fails: what happened, and what to do."""

import errno
import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ekiben import errors
from ekiben.cli import failures, root
from ekiben.cli.failures import explain
from ekiben.cli.options import KIND

HTTPS, HTTP = "https://127.0.0.1:7400", "http://127.0.0.1:7500"


@pytest.mark.parametrize(
    ("error", "endpoint", "what", "hint"),
    [
        (
            errors.Unavailable(
                "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7400: Tls handshake failed "
                "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:"
                "WRONG_VERSION_NUMBER: Invalid certificate verification context: OK"
            ),
            HTTPS,
            "does not speak TLS",
            "http://127.0.0.1:7400",
        ),
        (
            errors.Unavailable("failed to connect: [SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:992)"),
            HTTPS,
            "does not speak TLS",
            "http://127.0.0.1:7400",
        ),
        (
            errors.Unavailable(
                "errors resolving x.invalid:7400: [field:hostname lookup error:address lookup failed for "
                "x.invalid:7400: Domain name not found]"
            ),
            "http://x.invalid:7400",
            "The host of http://x.invalid:7400 is not known",
            "misspelt",
        ),
        (
            errors.Unavailable("failed to connect: [Errno -2] Name or service not known"),
            "http://x.invalid:7400",
            "The host of http://x.invalid:7400 is not known",
            "misspelt",
        ),
        (
            errors.Unimplemented("Received http2 header with status: 404"),
            HTTP,
            "http://127.0.0.1:7500 is no Ekiben, or a proxy before it passes no gRPC on (404).",
            "`ekiben up` prints",
        ),
        (
            errors.NotFound("deployments/x does not exist.", reason="DEPLOYMENT_NOT_FOUND"),
            HTTP,
            "deployments/x does not exist.",
            "`ekiben deployments list` shows which there are.",
        ),
        (
            errors.NotFound("It is not there; `ekiben x` says why.", reason="DEPLOYMENT_NOT_FOUND"),
            HTTP,
            "It is not there; `ekiben x` says why.",
            "",
        ),
        (
            errors.AlreadyExists("Secret 'x' exists already.", reason="SECRET_EXISTS"),
            HTTP,
            "Secret 'x' exists already.",
            "`ekiben secrets update` changes it.",
        ),
    ],
)
def test_what_happened_and_what_to_do(error: Exception, endpoint: str, what: str, hint: str) -> None:
    happened, todo = explain(error, endpoint)
    assert what in happened
    assert hint in todo and bool(hint) == bool(todo)


@pytest.mark.parametrize(("written", "read"), [("model", "models"), ("models", "models"), ("bento", "bentos")])
def test_a_kind_may_be_singular(written: str, read: str) -> None:
    assert KIND.convert(written, None, None) == read
    with pytest.raises(click.BadParameter, match="'image' is not one of"):
        KIND.convert("image", None, None)


def test_status_says_where_no_ekiben_is(tmp_path: Path) -> None:
    (tmp_path / "readyz").write_text("\n")  # as a replica answers
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        for _ in range(2):
            done = CliRunner().invoke(root, ["--endpoint", f"http://127.0.0.1:{server.server_port}", "status"])
            assert isinstance(done.exception, errors.FailedPrecondition) and "is no Ekiben" in str(done.exception)
            (tmp_path / "readyz").unlink(missing_ok=True)
        server.shutdown()


def test_every_command_that_is_recommended_exists() -> None:
    for said in {*failures._LISTS.values(), *failures._CHANGES.values()}:
        words = [word.partition("|")[0] for word in said.split() if word.islower() and not word.startswith("-")]
        done = CliRunner().invoke(root, [*words, "--help"])
        assert done.exit_code == 0, f"{said}: {done.output}"


def test_a_full_disk_behind_the_output_is_told_once() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ekiben.cli", "version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
    told = "Error: No space left on device\nMake room there, then run the command again.\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_what_failed_among_several_at_once_is_told_itself(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/mnt/x")
    assert failures.report(ExceptionGroup("unhandled errors in a TaskGroup", [full]), {}) == 1
    assert capsys.readouterr().err.startswith("Error: /mnt/x: No space left on device\n")


@pytest.mark.parametrize(
    ("places", "words"), [((), "Say where"), (("--output", "oci:o", "--push", "x.example/y"), "one place")]
)
def test_an_image_goes_to_one_place(places: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(root, ["images", "build", "summarizer", *places])
    assert done.exit_code == 2 and words in done.output
