"""Endpoints, contexts and the words of the command line."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from ekiben import client, contexts
from ekiben.cli import output, short
from ekiben.cli.options import DURATION, PAIR, TIME
from ekiben.endpoints import Endpoint
from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound


@pytest.mark.parametrize(
    ("text", "target", "tls", "url"),
    [
        ("http://127.0.0.1:7400", "127.0.0.1:7400", False, "http://127.0.0.1:7400"),
        ("https://ekiben.example.com/", "ekiben.example.com:443", True, "https://ekiben.example.com:443"),
        ("localhost:7400", "localhost:7400", False, "http://localhost:7400"),
        ("http://[::1]:7400", "[::1]:7400", False, "http://[::1]:7400"),
    ],
)
def test_endpoints_are_read_as_people_write_them(text: str, target: str, tls: bool, url: str) -> None:
    endpoint = Endpoint.parse(text)
    assert (endpoint.target, endpoint.tls, endpoint.url) == (target, tls, url)
    assert endpoint.loopback == ("example" not in text)
    assert endpoint.resolve("/blobs/x?a=b") == f"{url}/blobs/x?a=b"
    assert endpoint.resolve("https://bucket/x") == "https://bucket/x"


@pytest.mark.parametrize("text", ["", "ftp://x", "http://", "http://x:99999", "http://x:y"])
def test_other_endpoints_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="endpoint"):
        Endpoint.parse(text)


def test_contexts_survive_saving_and_a_broken_file_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "ekiben" / "config.yaml"
    assert contexts.load(file) == contexts.Contexts()
    kept = contexts.Contexts().with_context("a", contexts.Context("http://a:1", "ekb_a"))
    kept = kept.with_context("b", contexts.Context("http://b:1"))
    contexts.save(kept, file)
    assert contexts.load(file) == kept and kept.current == "b" and file.stat().st_mode & 0o777 == 0o600
    assert kept.without("b").current == ""
    with pytest.raises(NotFound, match="a, b"):
        kept.get("c")
    for text in ("[1]", "contexts: {a: 1}", "contexts: {a: {}}", "{", "\x00"):
        file.write_text(text)
        with pytest.raises(FailedPrecondition, match=r"config\.yaml"):
            contexts.load(file)


def test_the_environment_goes_before_the_context_and_tokens_do_not_wander(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "config.yaml"))
    kept = contexts.Context("http://a:1", "ekb_a")
    contexts.save(contexts.Contexts().with_context("a", kept))
    assert client.where(env={}) == kept
    assert client.where(env={"EKIBEN_API_TOKEN": "ekb_x"}) == contexts.Context("http://a:1", "ekb_x")
    assert client.where(env={"EKIBEN_ENDPOINT": "a:1"}) == contexts.Context("a:1", "ekb_a")
    assert client.where(env={"EKIBEN_ENDPOINT": "http://b:1"}) == contexts.Context("http://b:1", "")
    assert client.where(context="a", env={"EKIBEN_ENDPOINT": "http://b:1", "EKIBEN_API_TOKEN": "x"}) == kept
    assert client.where("http://b:1", "ekb_b", env={}) == contexts.Context("http://b:1", "ekb_b")
    monkeypatch.setenv("EKIBEN_CONFIG", str(tmp_path / "none.yaml"))
    assert client.where(env={}) == contexts.Context("http://127.0.0.1:7400", "")


def test_short_names_are_made_whole() -> None:
    assert short.model("iris") == "modelRepositories/iris/models/latest"
    assert short.model("iris:v1") == short.model("modelRepositories/iris/models/v1")
    assert short.bento("a.b:v1") == "bentoRepositories/a.b/bentos/v1"
    assert short.resource("deployments", "demo") == short.resource("deployments", "deployments/demo")
    assert short.revision("deployments/demo", "3") == "deployments/demo/revisions/3"
    assert short.trace("AB" * 16) == short.trace(f"00-{'ab' * 16}-{'cd' * 8}-01") == f"traces/{'ab' * 16}"
    for bad in ("Demo", "builds/x", "a" * 300):
        with pytest.raises(InvalidArgument):
            short.resource("deployments", bad)


def test_durations_and_times() -> None:
    assert [DURATION.convert(text, None, None) for text in ("90", "90s", "15m", "2h30m", "1.5d")] == [
        *(90, 90, 900, 9000, 129600)
    ]
    ago = TIME.convert("15m", None, None)
    assert abs(datetime.now(UTC) - ago - timedelta(minutes=15)) < timedelta(seconds=5)
    assert TIME.convert("2026-01-31T12:00:00Z", None, None) == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert PAIR.convert("a=b=c", None, None) == ("a", "b=c")
    for kind, text in ((DURATION, "soon"), (DURATION, ""), (TIME, "yesterday"), (PAIR, "a"), (PAIR, "=b")):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def test_sizes_and_durations_are_written_for_people() -> None:
    assert [output.size(count) for count in (0, 1023, 1024, 1536, 1 << 30, 5 << 40)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 GiB", "5.0 TiB")
    ]
    assert [output.nanoseconds(count) for count in (840_000, 12_300_000, 4_560_000_000)] == [
        *("840 µs", "12.3 ms", "4.56 s")
    ]


def test_a_shortcut_is_for_this_machine_and_for_who_may_open_it(tmp_path: Path) -> None:
    socket_path = tmp_path / "a b.sock"
    here, elsewhere = Endpoint.parse("127.0.0.1:7400"), Endpoint.parse("example.org:7400")
    assert here.shortcut("/blobs/x?a=b", str(socket_path)) == ""
    socket_path.touch()
    assert here.shortcut("/blobs/x?a=b", str(socket_path)).endswith("a%20b.sock/blobs/x?a=b")
    assert here.shortcut("/blobs/x", "") == elsewhere.shortcut("/blobs/x", str(socket_path)) == ""
