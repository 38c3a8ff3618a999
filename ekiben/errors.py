"""The errors of the suite: one tree, raised anywhere, raised again as the same class in the caller.

    EkibenError
    ├── InvalidArgument      wrong whatever the state: fix the request
    ├── FailedPrecondition   the state must change first
    ├── Unauthenticated      no token, or one that does not work
    ├── PermissionDenied     the token works but may not do this
    ├── NotFound             what was named does not exist
    ├── AlreadyExists        what should be created is there
    ├── Aborted              an etag, lease or transaction was lost: read again, redo
    ├── ResourceExhausted    a quota or a queue is full: wait
    ├── Unavailable          a dependency is away: retry this very call
    ├── DeadlineExceeded     the time ended
    ├── Cancelled            the caller's interest ended
    ├── Unimplemented        not offered here
    ├── DataLoss             bytes do not match their digest
    └── Internal             a bug; the text says nothing, the log says all

An error has a sentence (what is wrong, then what to do), a reason (`MODEL_NOT_FOUND`, listed in
`docs/errors.md`, kept for ever) and metadata: each value that the sentence holds. It crosses gRPC
as a `google.rpc.Status` with an `ErrorInfo` of the domain `ekiben.dev` (AIP-193).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "ekiben.dev"

# A status travels in HTTP/2 trailers, which peers limit to 8 KiB by default and which hold the text
# twice: once in grpc-message, once in the details. These keep the whole below that.
_MAX_MESSAGE_CHARS = 1500
_MAX_VALUE_CHARS = 300
_MAX_VIOLATIONS = 15


class EkibenError(Exception):
    """An error with a reason: the base of all that the suite raises on purpose.

    Args:
        message: a sentence saying what is wrong, then what to do.
        reason: UPPER_SNAKE_CASE, stable; the class's own name in that form when left out.
        violations: (field, description) for each field at fault.
        retry_after_s: when to try again, in seconds; told to the caller as RetryInfo.
        request_id: id of the call that failed; set on the client's side.
        metadata: each value that the sentence holds, `model="modelRepositories/iris/models/v1"`.
    """

    code: ClassVar[int] = 2
    """Number in `google.rpc.Code`."""
    code_name: ClassVar[str] = "UNKNOWN"
    """Its name."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Iterable[tuple[str, str]] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code_name
        self.violations: list[tuple[str, str]] = list(violations)
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}

    def __str__(self) -> str:
        return self.message


class InvalidArgument(EkibenError):
    """The request is wrong whatever the state; `violations` names the fields."""

    code = 3
    code_name = "INVALID_ARGUMENT"


class FailedPrecondition(EkibenError):
    """The state must change before this can be done."""

    code = 9
    code_name = "FAILED_PRECONDITION"


class Unauthenticated(EkibenError):
    """No token was sent, or it does not work."""

    code = 16
    code_name = "UNAUTHENTICATED"


class PermissionDenied(EkibenError):
    """The caller may not do this."""

    code = 7
    code_name = "PERMISSION_DENIED"


class NotFound(EkibenError):
    """What was named does not exist."""

    code = 5
    code_name = "NOT_FOUND"


class AlreadyExists(EkibenError):
    """What should be created exists."""

    code = 6
    code_name = "ALREADY_EXISTS"


class Aborted(EkibenError):
    """An etag, a lease or a transaction was lost: read again, then redo."""

    code = 10
    code_name = "ABORTED"


class ResourceExhausted(EkibenError):
    """A quota, a queue or a disk is full."""

    code = 8
    code_name = "RESOURCE_EXHAUSTED"


class Unavailable(EkibenError):
    """A dependency is away or the server is stopping: retry this call."""

    code = 14
    code_name = "UNAVAILABLE"


class DeadlineExceeded(EkibenError):
    """The time for the call ended."""

    code = 4
    code_name = "DEADLINE_EXCEEDED"


class Cancelled(EkibenError):
    """The interest in the call ended."""

    code = 1
    code_name = "CANCELLED"


class Unimplemented(EkibenError):
    """Not offered by this server."""

    code = 12
    code_name = "UNIMPLEMENTED"


class DataLoss(EkibenError):
    """Stored or sent bytes do not match their digest."""

    code = 15
    code_name = "DATA_LOSS"


class Internal(EkibenError):
    """A bug in the server. The text is fixed; the request id leads to the log."""

    code = 13
    code_name = "INTERNAL"


CLASSES: dict[int, type[EkibenError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        FailedPrecondition,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Aborted,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        Unimplemented,
        DataLoss,
        Internal,
    )
}
"""Each class by its number in `google.rpc.Code`."""

_TAKEN_AS = {2: Internal, 11: InvalidArgument}  # UNKNOWN and OUT_OF_RANGE, which the suite never sends


def class_of(code: int) -> type[EkibenError]:
    """The class for a number of `google.rpc.Code`; Internal for one that nobody knows."""
    return CLASSES.get(code) or _TAKEN_AS.get(code, Internal)


def to_status(error: EkibenError, *, request_id: str = "") -> status_pb2.Status:
    """The error as it crosses a hop: ErrorInfo always, and the details that its class has.

    Texts are cut to what HTTP/2 trailers carry, which no sentence of ours reaches.
    """
    status = status_pb2.Status(code=error.code, message=_cut(error.message, _MAX_MESSAGE_CHARS))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in error.metadata.items():
        info.metadata[key] = _cut(value, _MAX_VALUE_CHARS)
    status.details.add().Pack(info)
    violations = [(f, _cut(d, _MAX_VALUE_CHARS)) for f, d in error.violations[:_MAX_VIOLATIONS]]
    if violations and isinstance(error, FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure()
        for field, description in violations:
            failure.violations.add(type=error.reason, subject=field, description=description)
        status.details.add().Pack(failure)
    elif violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations:
            bad.field_violations.add(field=field, description=description)
        status.details.add().Pack(bad)
    if isinstance(error, NotFound | AlreadyExists) and error.metadata:
        key, value = next(iter(error.metadata.items()))
        kind = f"{DOMAIN}/{''.join(word.capitalize() for word in key.split('_'))}"
        resource = error_details_pb2.ResourceInfo(resource_type=kind, resource_name=_cut(value, _MAX_VALUE_CHARS))
        status.details.add().Pack(resource)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id or error.request_id:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id or error.request_id))
    return status


def from_status(status: status_pb2.Status) -> EkibenError:
    """The error that `to_status` was given; details of other senders are taken as far as they go."""
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[tuple[str, str]] = []
    retry_after_s: float | None = None
    request_id = ""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        failure = error_details_pb2.PreconditionFailure()
        retry = error_details_pb2.RetryInfo()
        request = error_details_pb2.RequestInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(failure):
            violations += [(v.subject, v.description) for v in failure.violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(request):
            request_id = request.request_id
    error = class_of(status.code)(
        status.message, reason=reason, violations=violations, retry_after_s=retry_after_s, request_id=request_id
    )
    error.metadata = metadata
    return error


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
