"""Errors as RFC 9457 problems."""

import grpc
import pytest
from grpc import aio

from ekiben import errors
from services.kernel.problems import http_status, problem_of


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.InvalidArgument, 400),
        (errors.FailedPrecondition, 400),
        (errors.Unauthenticated, 401),
        (errors.PermissionDenied, 403),
        (errors.NotFound, 404),
        (errors.AlreadyExists, 409),
        (errors.Aborted, 409),
        (errors.ResourceExhausted, 429),
        (errors.Unavailable, 503),
        (errors.DeadlineExceeded, 504),
        (errors.Cancelled, 499),
        (errors.Unimplemented, 501),
        (errors.DataLoss, 500),
        (errors.Internal, 500),
    ],
)
def test_each_class_has_its_status(cls: type[errors.EkibenError], status: int) -> None:
    assert http_status(cls("x")) == status
    assert problem_of(cls("x"))[0] == status


@pytest.mark.parametrize("reason", ["STORAGE_FULL", "DISK_FULL"])
def test_a_full_disk_is_told_apart_from_too_many_requests(reason: str) -> None:
    status, _, problem = problem_of(errors.ResourceExhausted("full", reason=reason))
    assert (status, problem["status"], problem["code"]) == (507, 507, "RESOURCE_EXHAUSTED")


def test_a_problem_says_all_that_the_error_does() -> None:
    error = errors.NotFound("No model.", reason="MODEL_NOT_FOUND", violations=[("name", "x")], model="m")
    status, headers, problem = problem_of(error, request_id="0123456789abcdef0123456789abcdef", inference=True)
    assert problem["type"].endswith("/errors#model-not-found")
    assert problem["status"] == status == 404
    assert problem["detail"] == problem["error"] == "No model."
    assert (problem["code"], problem["reason"], problem["metadata"]) == ("NOT_FOUND", "MODEL_NOT_FOUND", {"model": "m"})
    assert problem["violations"] == [{"field": "name", "description": "x"}]
    assert problem["instance"] == "urn:uuid:01234567-89ab-cdef-0123-456789abcdef"
    assert headers["Content-Type"] == "application/problem+json"


def test_headers_tell_when_to_retry_and_how_to_authenticate() -> None:
    assert problem_of(errors.Unavailable("x", retry_after_s=0.2))[1]["Retry-After"] == "1"
    assert "Bearer" in problem_of(errors.Unauthenticated("x"))[1]["WWW-Authenticate"]


def test_a_foreign_error_keeps_its_text_inside() -> None:
    status, _, problem = problem_of(RuntimeError("password is hunter2"))
    assert status == 500 and "hunter2" not in str(problem)


def test_a_raw_grpc_error_is_taken_too() -> None:
    raw = aio.AioRpcError(grpc.StatusCode.NOT_FOUND, aio.Metadata(), aio.Metadata(), "gone", None)
    assert problem_of(raw)[2]["detail"] == "gone"
