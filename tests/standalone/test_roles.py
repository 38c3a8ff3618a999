"""Who may call what: each method of each service, with a token of each role, gets what its proto says."""

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from ekiben.api.v1 import annotations_pb2
from services.gateway.bindings import API_FILES, RoutingTable, read_bindings
from tests.platform import Platform

ROLES = ("anyone", "viewer", "developer", "admin")
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
BROKEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)


def methods() -> Iterator[MethodDescriptor]:
    """Every method of the suite's own services, internal ones included."""
    for file in API_FILES:
        for service in file.services_by_name.values():
            yield from service.methods


@pytest.fixture(scope="module")
def tokens(platform: Platform) -> dict[str, str]:
    """A token of each role."""
    made = {
        role: platform.ekiben_json("tokens", "create", f"matrix-{role}", "--role", role)["token"] for role in ROLES[1:]
    }
    return {"anyone": "", **made}


def answer_of(platform: Platform, method: MethodDescriptor, token: str) -> grpc.StatusCode:
    """What an empty request gets: whoever is let in gets past the check, mostly to be told what it lacks."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{platform.port}") as channel:
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = kind(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        # A stream to which nothing happens says nothing: that it is not refused at once is its answer.
        timeout_s = 2 if method.server_streaming else 20
        try:
            answer = call(GetMessageClass(method.input_type)(), metadata=metadata, timeout=timeout_s)
            if method.server_streaming:
                next(answer, None)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", list(methods()), ids=lambda method: method.full_name)
def test_a_method_lets_in_who_its_policy_names_and_nobody_else(
    platform: Platform, tokens: dict[str, str], method: MethodDescriptor
) -> None:
    policy = method.GetOptions().Extensions[annotations_pb2.policy]
    assert policy.role != annotations_pb2.ROLE_UNSPECIFIED
    least = annotations_pb2.Role.Name(policy.role).removeprefix("ROLE_").lower()
    for role in ROLES:
        code = answer_of(platform, method, tokens[role])
        if least != "service" and ROLES.index(role) >= ROLES.index(least):
            assert code not in REFUSED, (role, code)
            assert code not in BROKEN, (role, code)
        elif role == "anyone" and least != "service":  # the gateway passes no internal method on, whoever asks
            assert code is grpc.StatusCode.UNAUTHENTICATED
        else:
            assert code is grpc.StatusCode.PERMISSION_DENIED, (role, code)


def test_http_refuses_whom_grpc_refuses(platform: Platform, tokens: dict[str, str]) -> None:
    table = RoutingTable(read_bindings())
    for binding in table.bindings:
        least = binding.method.GetOptions().Extensions[annotations_pb2.policy].role
        path = binding.template.text
        for field, template in binding.template.parts:
            if template:
                path = path.replace(f"{{{field}={template}}}", template.replace("*", "nothing"))
        if binding.streams:
            continue
        for role in ROLES[:3]:
            wanted = getattr(annotations_pb2, f"ROLE_{role.upper()}")
            answer = platform.api(binding.verb, path, {} if binding.body else None, tokens[role])
            refused = answer.status in (401, 403)
            assert refused == (wanted < least), (binding.verb, path, role, answer.status, answer.body)
            if refused:
                problem = answer.json()
                assert {k.lower(): v for k, v in answer.headers.items()}["content-type"] == "application/problem+json"
                assert problem["status"] == answer.status
                assert {"type", "title", "detail", "instance", "code", "reason"} <= problem.keys()


def test_a_refusal_is_in_the_audit_log(platform: Platform, tokens: dict[str, str]) -> None:
    assert (
        platform.api("POST", "/v1/users", {"name": "users/eve", "role": "ROLE_ADMIN"}, tokens["viewer"]).status == 403
    )
    refused = platform.ekiben_json("audit", "list", "--refused", "--limit", "200")
    assert any(entry["method"].endswith("CreateUser") for entry in refused)
