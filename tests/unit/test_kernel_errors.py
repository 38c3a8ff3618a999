"""Errors keep class, reason and all that they tell across a hop."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio

from ekiben import errors
from ekiben.channel import STATUS_KEY, from_rpc_error


@pytest.mark.parametrize("cls", errors.CLASSES.values(), ids=lambda cls: cls.__name__)
def test_every_class_crosses_as_itself_with_reason_metadata_and_violations(cls: type[errors.EkibenError]) -> None:
    sent = cls(
        "Model 'a' does not exist.",
        reason="MODEL_NOT_FOUND",
        violations=[("name", "is wrong")],
        retry_after_s=1.5,
        model="modelRepositories/a/models/b",
    )
    got = errors.from_status(errors.to_status(sent, request_id="r1"))
    assert type(got) is cls
    assert (got.message, got.reason, got.metadata) == (sent.message, sent.reason, sent.metadata)
    assert (got.violations, got.retry_after_s, got.request_id) == (sent.violations, 1.5, "r1")


def test_code_names_are_those_of_google_rpc() -> None:
    for code, cls in errors.CLASSES.items():
        assert code_pb2.Code.Name(code) == cls.code_name


def test_a_class_without_reason_has_its_codes_name() -> None:
    assert errors.Aborted("x").reason == "ABORTED"


def test_not_found_names_its_resource() -> None:
    status = errors.to_status(errors.NotFound("x", reason="X", model_repository="modelRepositories/a"))
    info = error_details_pb2.ResourceInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert (info.resource_type, info.resource_name) == ("ekiben.dev/ModelRepository", "modelRepositories/a")


def test_huge_texts_are_cut_to_what_trailers_carry() -> None:
    error = errors.InvalidArgument("x" * 100_000, violations=[("f" * 20, "d" * 10_000)] * 100, value="v" * 10_000)
    assert errors.to_status(error).ByteSize() < 8192


def test_foreign_details_and_codes_are_taken_as_far_as_they_go() -> None:
    status = status_pb2.Status(code=11, message="far", details=[any_pb2.Any(type_url="x/y", value=b"z")])
    got = errors.from_status(status)
    assert type(got) is errors.InvalidArgument and got.reason == "INVALID_ARGUMENT"
    assert errors.class_of(999) is errors.Internal


def test_an_rpc_error_without_our_details_still_becomes_a_class() -> None:
    for trailers in (aio.Metadata(), aio.Metadata((STATUS_KEY, b"\xff\xff\xff"))):
        raw = aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), trailers, "connection refused", None)
        got = from_rpc_error(raw)
        assert type(got) is errors.Unavailable
        assert (got.reason, got.message) == ("SERVER_UNREACHABLE", "connection refused")
