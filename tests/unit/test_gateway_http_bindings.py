"""HTTP paths found for gRPC methods, and requests read from them."""

import json
from typing import Any

import pytest

from ekiben.errors import InvalidArgument
from services.gateway.bindings import API_FILES, RoutingTable, parse_template, read_bindings
from services.gateway.requests import read_request

TABLE = RoutingTable(read_bindings())


def read(verb: str, path: str, query: list[tuple[str, str]] | None = None, body: bytes = b"") -> Any:
    """The gRPC request of an HTTP request."""
    binding, values = TABLE.find(path)[verb]
    return read_request(binding, values, query or [], body)


def test_every_annotated_method_is_bound_and_no_internal_one_is() -> None:
    bound = {binding.rpc for binding in TABLE.bindings}
    assert "/ekiben.registry.v1.Models/GetModel" in bound
    assert "/ekiben.identity.v1.Secrets/RevealSecrets" not in bound
    assert "/ekiben.deployer.v1.Routes/WatchRoutes" not in bound
    assert len({file.package for file in API_FILES}) == 5


def test_a_template_gives_the_whole_resource_name() -> None:
    template = parse_template("/v1/{model.name=modelRepositories/*/models/*}")
    assert template.match("/v1/modelRepositories/iris/models/v1") == {"model.name": "modelRepositories/iris/models/v1"}
    assert template.match("/v1/modelRepositories/iris/models") is None
    assert template.match("/v1/modelRepositories/iris/models/v1/") is None


def test_a_number_that_is_none_is_told_from_one_that_is_left_out() -> None:
    asked = read("GET", "/v1/deployments/demo:logs", [("tailLines", "0"), ("sinceTime", "2026-11-26T12:00:00Z")])
    assert asked.HasField("tail_lines") and asked.since_time.seconds == 1_795_694_400
    assert not read("GET", "/v1/deployments/demo:logs").HasField("tail_lines")


def test_a_custom_verb_is_no_part_of_an_id() -> None:
    assert set(TABLE.find("/v1/builds/b1:cancel")) == {"POST"}
    assert set(TABLE.find("/v1/builds/b1")) == {"GET"}
    assert TABLE.find("/v1/builds/b1:destroy") == {}
    assert set(TABLE.find("/v1/logins:approve")) == {"POST"}


def test_an_escaped_slash_does_not_reach_another_resource() -> None:
    request = read("GET", "/v1/modelRepositories/a%2Fmodels%2Fb")
    assert request.name == "modelRepositories/a%2Fmodels%2Fb"
    with pytest.raises(InvalidArgument) as caught:
        read("GET", "/v1/modelRepositories/%FF")
    assert caught.value.reason == "PATH_INVALID"


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v2/models", "/v1//models", "/v1/nothing", "//v1/models"])
def test_an_unknown_path_has_no_binding(path: str) -> None:
    assert TABLE.find(path) == {}


def test_the_body_may_be_a_field_or_the_whole_request() -> None:
    one = read("POST", "/v1/modelRepositories", body=b'{"name": "modelRepositories/iris", "description": "x"}')
    assert one.model_repository.description == "x"
    whole = read("POST", "/v1/uploads/u1:sign", body=b'{"partNumber": 3, "name": "uploads/other"}')
    assert (whole.name, whole.part_number) == ("uploads/u1", 3)
    empty = read("POST", "/v1/deployments", body=b"{}")
    assert empty.HasField("deployment")


def test_both_spellings_of_a_field_are_read() -> None:
    for name in ("partNumber", "part_number"):
        assert read("POST", "/v1/uploads/u1:sign", body=json.dumps({name: 2}).encode()).part_number == 2
    for name in ("pageSize", "page_size"):
        assert read("GET", "/v1/modelRepositories", [(name, "7")]).page_size == 7


def test_query_parameters_of_every_kind() -> None:
    request = read(
        "GET",
        "/v1/predictions",
        [("startTime", "2026-01-02T03:04:05Z"), ("includeBodies", "true"), ("pageSize", "5"), ("status", "")],
    )
    assert request.start_time.ToJsonString() == "2026-01-02T03:04:05Z"
    assert request.include_bodies
    assert not request.status
    mask = [("updateMask", "description,access_authorization")]
    update = read("PATCH", "/v1/deployments/d", mask, b"{}")
    assert list(update.update_mask.paths) == ["description", "access_authorization"]


@pytest.mark.parametrize(
    ("verb", "path", "query", "named"),
    [
        ("GET", "/v1/modelRepositories", [("pageSise", "1")], "pageSise"),
        ("GET", "/v1/modelRepositories", [("pageSize", "one")], "pageSize"),
        ("GET", "/v1/modelRepositories", [("pageSize", "1"), ("pageSize", "2")], "pageSize"),
        ("GET", "/v1/modelRepositories", [("pageSize", "99999999999")], "pageSize"),
        ("GET", "/v1/modelRepositories/iris", [("name", "modelRepositories/other")], "name"),
        ("GET", "/v1/predictions", [("includeBodies", "yes")], "includeBodies"),
        ("GET", "/v1/predictions", [("startTime", "yesterday")], "startTime"),
        ("GET", "/v1/predictions", [("startTime.seconds", "1")], "startTime.seconds"),
        ("POST", "/v1/uploads/u1:sign", [("partNumber", "1")], "partNumber"),
        ("POST", "/v1/deployments", [("deployment.name", "x")], "deployment.name"),
    ],
)
def test_a_bad_parameter_is_refused_and_named(verb: str, path: str, query: list[tuple[str, str]], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(verb, path, query)
    assert caught.value.reason == "PARAMETER_INVALID"
    assert [field for field, _ in caught.value.violations] == [named]
    assert "ekiben." not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"nul", b"\xff\xfe{}", b"[]", b"null", b'"text"', b'{"name": NaN}', b'{"name": "a", "name": "b"}',
        b"[" * 100_000, b'{"a":' * 5_000, b'{"labels": ' + b"9" * 5_000 + b"}", b'{"name": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read("POST", "/v1/modelRepositories", body=body)
    assert caught.value.reason in ("JSON_MALFORMED", "BODY_INVALID")
    assert len(str(caught.value)) < 800


def test_malformed_json_says_where() -> None:
    with pytest.raises(InvalidArgument, match="line 2, column 3"):
        read("POST", "/v1/modelRepositories", body=b'{"name":\n  x}')


@pytest.mark.parametrize(
    "body",
    [
        {"nothing": 1}, {"name": 5}, {"labels": []}, {"labels": {"a": 5}}, {"createTime": "soon"},
        {"modelCount": "many"}, {"modelCount": 1 << 40}, {"modelCount": 1.5},
    ],
)  # fmt: skip
def test_a_body_of_another_shape_is_refused_in_words(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read("POST", "/v1/modelRepositories", body=json.dumps(body).encode())
    assert caught.value.reason == "BODY_INVALID"
    assert "ekiben." not in str(caught.value)


def test_nested_structs_are_bounded() -> None:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    body = {"template": {"services": {"S": {"configOverrides": deep}}}}
    with pytest.raises(InvalidArgument):
        read("POST", "/v1/deployments", body=json.dumps(body).encode())


def test_a_body_where_none_belongs_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        read("DELETE", "/v1/modelRepositories/iris", body=b'{"force": true}')
    assert caught.value.reason == "BODY_UNEXPECTED"
