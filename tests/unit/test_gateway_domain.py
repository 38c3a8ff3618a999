"""Shares, names, captures' lines and metrics pages, without an Envoy."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.gateway import exposition, messages, routes
from services.gateway.domain import Endpoint, Route, RouteTable, Target, cluster_of
from services.gateway.metrics import ENVOY_FAMILIES, Metrics, _renamed, failures
from services.gateway.records import prediction_from_line, redacted_path
from services.gateway.settings import Settings
from services.kernel.clock import ManualClock
from services.kernel.settings import SettingsError
from tests.fixtures_gateway import serve

READY = (Endpoint("r", "127.0.0.1:1"),)


def target(name: str, weight: int, ready: bool = True) -> Target:
    return Target(name, f"deployments/d/revisions/{weight + 1}", "b", weight=weight, endpoints=READY if ready else ())


def shares(*targets: Target, **fields: str) -> dict[str, int]:
    return {each.target: weight for each, weight in Route("deployments/d", targets=targets, **fields).shares()}  # type: ignore[arg-type]


def test_the_share_of_a_target_without_replicas_goes_to_the_others() -> None:
    assert shares(target("main", 80), target("canary", 20)) == {"main": 80, "canary": 20}
    assert shares(target("main", 80, ready=False), target("canary", 20)) == {"canary": 20}
    assert shares(target("main", 0), target("canary", 100, ready=False)) == {"main": 1}
    assert shares(target("main", 0), target("canary", 100)) == {"canary": 100}
    assert shares(target("main", 100, ready=False)) == {}


def test_requests_that_name_no_target_go_to_main_where_a_header_names_it() -> None:
    named = {"route_type": "header", "route_by": "x-version"}
    assert shares(target("main", 80), target("canary", 20), **named) == {"main": 1}
    assert shares(target("main", 80, ready=False), target("canary", 20), **named) == {"canary": 20}


names = st.text(min_size=1, max_size=8, alphabet=st.sampled_from("ab-_./ :ä1"))


@given(st.tuples(names, names, names, names), st.tuples(names, names, names, names))
def test_different_targets_have_different_clusters_whose_names_are_file_names(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    parts = [tuple(part.rpartition("/")[2] for part in each) for each in (one, other)]
    clusters = [cluster_of(*each) for each in parts]
    assert (clusters[0] == clusters[1]) == (
        (parts[0][0], parts[0][1] or "main", *parts[0][2:]) == (parts[1][0], parts[1][1] or "main", *parts[1][2:])
    )
    assert all(
        set(cluster) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_ABCDEFGHIJKLMNOPQRSTUVWXYZ") for cluster in clusters
    )


@given(st.lists(st.text(max_size=20), max_size=4), st.text(max_size=20), st.text(max_size=20))
def test_facts_survive_the_log(models: list[str], target_name: str, bento: str) -> None:
    route = Route("deployments/d", organization="organizations/default")
    facts = messages.facts_of(route, Target(target_name, "deployments/d/revisions/1", bento, tuple(models)))
    assert json.dumps(facts) == f'"{facts}"'
    read = messages.read_facts(facts)
    assert (read["target"], read["bento"], read["models"]) == (target_name, bento, models)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_line_without_a_replica_or_a_response_is_a_prediction_all_the_same() -> None:
    fields = {
        "id": "1",
        "start": "1795600795.292149",
        "us": None,
        "ms": 1500,
        "status": 0,
        "flags": "DC",
        "protocol": "HTTP/1.1",
        "received": 3000000.0,
        "sent": 0,
        "trace": None,
        "parent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-00",
        "host": "h",
        "qh": encoded(b"x-a:1\nx-a:2\nx-b:\xe4"),
        "q0": encoded(b"ab") + "," + encoded(b"c"),
        "sh": None,
        "more": {"q1": encoded(b"d")},
    }
    prediction = prediction_from_line(json.dumps(fields).encode())
    assert prediction.name == "predictions/1"
    assert dict(prediction.request.headers) == {"host": "h", "x-a": "1, 2", "x-b": "ä"}
    assert prediction.request.body == b"abcd"
    assert (prediction.request.body_size_bytes, prediction.request.truncated) == (3_000_000, True)
    assert prediction.latency.ToMilliseconds() == 1500
    assert prediction.start_time.ToNanoseconds() == 1795600795292149000
    assert prediction.trace_id == "ab" * 16
    assert (prediction.status, prediction.response_flags, prediction.response.body) == (0, "DC", b"")


def test_what_was_cut_off_is_told_from_what_is_whole() -> None:
    whole = {"id": "1", "status": 200, "received": 2, "sent": 2, "rx": 10, "fb": 2000, "us": 3000}
    whole |= {"qh": encoded(b"x:1"), "q0": encoded(b"ab"), "sh": encoded(b"x:1"), "s0": encoded(b"cd")}

    def cut(**fields: object) -> tuple[bool, bool]:
        prediction = prediction_from_line(json.dumps(whole | fields).encode())
        return prediction.request.truncated, prediction.response.truncated

    assert cut() == (False, False)
    assert cut(rx=None) == (True, False)  # Answered before the whole had come.
    assert cut(us=None) == (False, True)  # The caller left in the answer, or the replica ended.
    assert cut(rx=None, us=None, status=0) == (True, False)
    assert cut(rx=None, us=None, status=101) == (False, False)  # A WebSocket: it ends with its connection.
    kept = prediction_from_line(json.dumps(whole).encode())
    assert kept.time_to_first_byte.ToMicroseconds() == 2000
    assert not prediction_from_line(json.dumps(whole | {"fb": None}).encode()).HasField("time_to_first_byte")


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/p?x=1&api_key=k1&y=2", "/p?x=1&api_key=[redacted]&y=2"),
        ("/p?API-Key=k&access_token=t", "/p?API-Key=[redacted]&access_token=[redacted]"),
        ("/p?X-Amz-Signature=s&X-Amz-Credential=c", "/p?X-Amz-Signature=[redacted]&X-Amz-Credential=[redacted]"),
        ("/p?token=&tokens=5&max_tokens=7", "/p?token=[redacted]&tokens=5&max_tokens=7"),
        ("/token=1", "/token=1"),
    ],
)
def test_credentials_in_a_query_are_not_kept(path: str, kept: str) -> None:
    assert redacted_path(path) == kept


@given(st.binary(max_size=200))
def test_what_is_no_line_is_an_error_and_never_another(data: bytes) -> None:
    for junk in (data, b'{"id": 1, "more": ' + data, b'{"id":"1","q0":"' + data + b'"}'):
        with contextlib.suppress(ValueError):
            prediction_from_line(junk)


def test_internal_methods_are_not_public() -> None:
    public, internal = routes.public_methods(), routes.internal_methods()
    assert not set(public) & set(internal)
    assert public["/ekiben.registry.v1.Models/GetModel"] == "registry"
    assert public["/ekiben.identity.v1.Accounts/GetUser"] == "registry"
    assert "/ekiben.deployer.v1.Routes/WatchRoutes" in internal
    assert "/ekiben.recorder.v1.Predictions/RecordPredictions" in internal


def test_a_capture_policy_has_its_defaults_and_bounds() -> None:
    def policy(**fields: object) -> object:
        table = pb.RouteTable(routes=[pb.Route(deployment="deployments/d", capture=pb.CapturePolicy(**fields))])  # type: ignore[arg-type]
        capture = messages.table_from_proto(table).routes[0].capture
        return capture and (capture.sample_percent, capture.max_body_bytes, capture.redacted_headers)

    assert policy() == (100.0, 65536, frozenset())
    assert policy(sample_percent=0) is None
    assert policy(disabled=True) is None
    assert policy(max_body_bytes=0, redacted_headers=["X-A "]) == (100.0, 0, frozenset({"x-a"}))
    assert policy(max_body_bytes=1 << 30, sample_percent=1000) == (100.0, 1 << 20, frozenset())


def test_settings_tell_every_fault(tmp_path: object) -> None:
    with pytest.raises(SettingsError) as failure:
        Settings(data_dir="/d", run_dir="/r", port=99999, trace_sample_percent=101, tls_key_file="/k")  # type: ignore[arg-type]
    assert len(failure.value.faults) == 3


PAGE = """# HELP a_total Counts "a".
# TYPE a_total counter
a_total{x="1",replica="mine"} 1
# TYPE h histogram
h_bucket{le="1"} 1
h_bucket{le="+Inf"} 2
h_sum 3 1795600795000
h_count 2
nonsense here
b 4
"""


def test_pages_of_many_replicas_become_one_with_each_family_once() -> None:
    pages = [
        exposition.labelled(exposition.parse(PAGE), {"replica": name, "deployment": 'd"1'}) for name in ("one", "two")
    ]
    text = exposition.write(exposition.merge(pages)).decode()
    assert text.count("# TYPE a_total counter") == 1
    assert text.count("# TYPE h histogram") == 1
    assert 'a_total{x="1",exported_replica="mine",replica="one",deployment="d\\"1"} 1' in text
    assert 'h_bucket{le="+Inf",replica="two",deployment="d\\"1"} 2' in text
    assert 'h_sum{replica="one",deployment="d\\"1"} 3\n' in text
    assert 'b{replica="two",deployment="d\\"1"} 4' in text
    assert text.index("a_total") < text.index("# TYPE b ") < text.index("# TYPE h ")
    assert check(text) == ""


def test_a_family_that_sources_type_differently_keeps_the_first() -> None:
    other = "# TYPE a_total gauge\na_total 9\n"
    text = exposition.write(exposition.merge([exposition.parse(PAGE), exposition.parse(other)])).decode()
    assert text.count("# TYPE a_total") == 1
    assert "a_total 9" not in text


def test_numbers_are_read_as_they_are_written() -> None:
    text = "a 1e+05\nb +Inf\nc NaN\nd -.5\ne 1.\nf 1,5\n"
    assert [family.name for family in exposition.parse(text) if family.samples] == ["a", "b", "c", "d", "e"]


def test_envoys_families_are_renamed_to_base_units() -> None:
    page = """# TYPE envoy_cluster_upstream_rq_time histogram
envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="c",le="0.5"} 1
envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="c",le="+Inf"} 2
envoy_cluster_upstream_rq_time_sum{envoy_cluster_name="c"} 1500
envoy_cluster_upstream_rq_time_count{envoy_cluster_name="c"} 2
# TYPE envoy_secret counter
envoy_secret{} 1
"""
    text = exposition.write(_renamed(exposition.parse(page), {"c": {"deployment": "iris"}})).decode()
    assert 'ekiben_upstream_request_duration_seconds_bucket{le="0.0005",deployment="iris"} 1' in text
    assert 'ekiben_upstream_request_duration_seconds_sum{deployment="iris"} 1.5' in text
    assert "secret" not in text
    assert check(text) == ""
    assert len({name for name, *_ in ENVOY_FAMILIES.values()}) == len(ENVOY_FAMILIES)


def test_a_path_that_a_caller_chose_makes_no_metric_of_its_own() -> None:
    ends = "\r\x0b\x0c\x1c\x85\u2028"
    page = "".join(f'a{{path="/{end}forged 1{end}"}} 1\n' for end in ends)
    (family,) = exposition.parse(page)
    assert [sample[0] for sample in family.samples] == ["a"] * len(ends)
    assert check(exposition.write(exposition.merge([[family]])).decode()) == ""


@pytest.mark.parametrize("labels", ['bad-name="1"', 'x="1" y="2"', 'x="1', "x=1", 'x="\\q"', ',x="1"', 'x="1",,'])
def test_a_sample_that_prometheus_would_refuse_a_whole_page_for_is_left_out(labels: str) -> None:
    text = exposition.write(exposition.merge([exposition.parse(f'b{{{labels}}} 1\nb{{x="2",}} 2\n')])).decode()
    assert text == '# HELP b b\n# TYPE b untyped\nb{x="2"} 2\n'


async def scraped(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
    """The page while one replica answers as `handler` does."""
    async with serve(handler) as address:
        entry = target("main", 1)
        entry = dataclasses.replace(entry, endpoints=(Endpoint("r-1", address),))
        table = RouteTable(1, (Route("deployments/d", targets=(entry,)),))

        async def envoy() -> str:
            return "# TYPE envoy_server_uptime gauge\nenvoy_server_uptime{} 5\n"

        return (await Metrics(lambda: table, envoy, ManualClock()).render()).decode()


async def test_a_page_that_comes_in_pieces_is_read_to_its_end() -> None:
    async def pieces(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for number in range(3):
            await answer.write(b"".join(b'b{x="%d-%d"} 1\n' % (number, line) for line in range(5000)))
            await asyncio.sleep(0.01)  # The reader sees what came so far, not the whole.
        return answer

    assert 'b{x="2-4999",deployment="d"' in await scraped(pieces)


async def test_a_page_without_end_or_with_an_error_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b"b 1\n" * 10_000)

    async def failing(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="b 1\n")

    async def hanging(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("services.gateway.metrics.TIMEOUT_S", 0.5)
    for handler in (endless, failing, hanging):
        before = failures.labels("replica")._value.get()
        text = await scraped(handler)
        assert 'deployment="d"' not in text
        assert "ekiben_envoy_uptime_seconds 5" in text
        assert failures.labels("replica")._value.get() == before + 1


async def test_a_replica_that_does_not_answer_is_left_out_of_the_page() -> None:
    table = RouteTable(1, (Route("deployments/d", targets=(target("main", 1),)),))

    async def envoy() -> str:
        return "# TYPE envoy_server_uptime gauge\nenvoy_server_uptime{} 5\n"

    metrics = Metrics(lambda: table, envoy, ManualClock())
    text = (await metrics.render()).decode()
    assert "ekiben_envoy_uptime_seconds 5" in text
    assert 'ekiben_scrape_failures_total{kind="replica"}' in text
    assert check(text) == ""


def check(text: str) -> str:
    """What promtool says, where it is installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return ""
    done = subprocess.run([promtool, "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    return "\n".join(line for line in said.splitlines() if not line.startswith(("a_total", "b ", "h ")))
