"""A line of the capture log as a prediction. Pure.

The fields of a line are those of `listeners`; what `q…` and `s…` hold is said in `capture.lua`.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ekiben.recorder.v1 import recorder_pb2 as pb
from services.gateway.messages import read_facts

_NONE = "-"
_SWITCHED = 101
_SECRET_PARAMETER = re.compile(
    r"([?&;](?:[a-z0-9]+[-_])*(?:api[-_]?key|token|password|passwd|pwd|secret|signature|sig|credential)=)[^&;#]*",
    re.IGNORECASE,
)


def prediction_from_line(line: bytes) -> pb.Prediction:
    """The prediction of one line.

    Raises:
        ValueError: the line is torn, or not one of ours.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or not fields.get("id"):
        raise ValueError("The line holds no capture.")
    facts = _facts(fields.get("facts") or "")
    kept = {**fields, **(fields.get("more") or {})}
    if "|" in (headers := fields.get("qh") or ""):  # From `capture.c`.
        parts = zip(("qh", "q0", "sh", "s0"), headers.split("|"), strict=True)
        kept.update({key: part or None for key, part in parts})
    micros = fields.get("us")
    status = _number(fields.get("status"))
    # A direction whose last byte never came was cut off: the caller left, or the replica ended. A connection that
    # became another protocol's has no other end.
    asked = fields.get("rx", 0) is not None or status == _SWITCHED
    answered = micros is not None or status in (0, _SWITCHED)
    prediction = pb.Prediction(
        name=f"predictions/{fields['id']}",
        **facts,
        replica=fields.get("replica") or "",
        api_token=_text(fields.get("token")),
        method=fields.get("method") or "",
        path=redacted_path(fields.get("path") or ""),
        protocol=_text(fields.get("protocol")),
        status=status,
        response_flags=_text(fields.get("flags")),
        trace_id=_trace_id(fields),
        peer=_text(fields.get("peer")),
        request=_payload(kept, "q", _number(fields.get("received")), _text(fields.get("host")), whole=asked),
        response=_payload(kept, "s", _number(fields.get("sent")), whole=answered),
    )
    seconds, _, fraction = str(fields.get("start") or "0").partition(".")
    prediction.start_time.seconds = int(seconds)
    prediction.start_time.nanos = int(fraction.ljust(9, "0")[:9])
    # Without a last byte (the caller left) only the milliseconds of the whole request are known.
    prediction.latency.FromMicroseconds(_number(micros) if micros is not None else _number(fields.get("ms")) * 1000)
    if (first := fields.get("fb")) is not None:  # Else there was no answer.
        prediction.time_to_first_byte.FromMicroseconds(_number(first))
    return prediction


def redacted_path(path: str) -> str:
    """A path and query without the values of parameters that carry a credential, by the last word of their names:
    `?api_key=`, `&access-token=`."""
    return _SECRET_PARAMETER.sub(r"\1[redacted]", path) if "?" in path else path


def _payload(kept: Mapping[str, Any], side: str, size: int, host: str = "", *, whole: bool) -> pb.Payload:
    """One direction: `q` for the request, `s` for the response. `size` counts what passed, of the `whole` or not."""
    headers = _headers(kept.get(f"{side}h") or "", host)
    pieces, number = [], 0
    while (segment := kept.get(f"{side}{number}")) is not None:
        pieces += [_decoded(piece) for piece in segment.split(",")]
        number += 1
    body = b"".join(pieces)
    size = max(size, len(body))
    return pb.Payload(
        headers=headers,
        body=body,
        body_size_bytes=size,
        truncated=len(body) < size or not whole,
        content_type=headers.get("content-type", ""),
    )


def _headers(encoded: str, host: str) -> dict[str, str]:
    data = _decoded(encoded)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # What HTTP said of header values before it said nothing.
    headers = {"host": host} if host else {}
    for line in text.split("\n"):
        name, found, value = line.partition(":")
        if found:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _decoded(piece: str) -> bytes:
    try:
        return base64.b64decode(piece, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError("A captured piece is not base64.") from exc


@lru_cache(maxsize=1024)
def _facts(text: str) -> dict[str, Any]:
    return read_facts(text) if text else {}


def _trace_id(fields: Mapping[str, Any]) -> str:
    """Envoy's own, or where it does not trace the caller's."""
    trace_id = _text(fields.get("trace"))
    if len(trace_id) != 32:
        parts = _text(fields.get("parent")).split("-")
        trace_id = parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""
    return trace_id


def _text(value: Any) -> str:
    return "" if value in (None, _NONE) else str(value)


def _number(value: Any) -> int:
    """Envoy gives large numbers as `3000000.0`."""
    try:
        return int(float(value))
    except (TypeError, ValueError):
        return 0
