"""From the parts of an HTTP request to the gRPC request that it stands for: path, query parameters and JSON body.

Source: google/api/http.proto, and the ProtoJSON format of protocol buffers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from ekiben.errors import InvalidArgument
from services.gateway.bindings import Binding

# Messages that ProtoJSON writes as one scalar, so that a query parameter can hold them.
_SCALAR_MESSAGES = frozenset(
    f"google.protobuf.{name}"
    for name in (
        "Timestamp", "Duration", "FieldMask", "BoolValue", "StringValue", "BytesValue", "DoubleValue", "FloatValue",
        "Int32Value", "Int64Value", "UInt32Value", "UInt64Value",
    )
)  # fmt: skip
_CONVERSION_ERRORS = (json_format.ParseError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)


def read_request(
    binding: Binding, path_values: Mapping[str, str], query: Iterable[tuple[str, str]], body: bytes
) -> Message:
    """The gRPC request. What the path says wins over the body.

    An empty query parameter counts as absent: BentoML's clients send those.

    Raises:
        InvalidArgument: an unknown or unreadable parameter, or a body that is not JSON for the message; the
            violations name the field.
    """
    request = binding.input()
    if binding.body == "*":
        _read_json(body, request, "")
    elif binding.body:
        # Reading the field marks it present, also where the body is `{}`.
        getattr(request, binding.body).SetInParent()
        _read_json(body, getattr(request, binding.body), binding.body)
    elif body.strip():
        raise InvalidArgument("This method takes no body.", reason="BODY_UNEXPECTED")
    _read_query(binding, query, request)
    for field, value in path_values.items():
        _set_path(request, field.split("."), value)
    return request


def parse_json(body: bytes) -> Any:
    """The JSON value in a body.

    Raises:
        InvalidArgument: not UTF-8, not JSON (with its position), a key given twice, or nested too deeply.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"The body is not UTF-8: byte {error.start} cannot be decoded.", reason="JSON_MALFORMED"
        ) from error
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", reason="JSON_MALFORMED"
        ) from error
    except RecursionError as error:
        raise InvalidArgument("The body is nested too deeply.", reason="JSON_MALFORMED") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise InvalidArgument(f"The body is not JSON that can be read: {error}.", reason="JSON_MALFORMED") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidArgument(f"The body gives {repeated!r} twice.", reason="JSON_MALFORMED")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidArgument(f'The body holds {name}, which JSON does not know; write "{name}".', reason="JSON_MALFORMED")


def _read_json(body: bytes, into: Message, field: str) -> None:
    if not body.strip():
        return
    value = parse_json(body)
    if not isinstance(value, dict):
        raise InvalidArgument("The body must be a JSON object.", reason="JSON_MALFORMED")
    try:
        json_format.ParseDict(value, into)
    except _CONVERSION_ERRORS as error:
        raise InvalidArgument(
            f"The body does not fit {into.DESCRIPTOR.name}: {_reworded(error)}",
            reason="BODY_INVALID",
            violations=[(field or into.DESCRIPTOR.name, _reworded(error))],
        ) from error


def _read_query(binding: Binding, query: Iterable[tuple[str, str]], request: Message) -> None:
    given: dict[str, list[str]] = {}
    for name, value in query:
        if value:
            given.setdefault(name, []).append(value)
    taken = {binding.body, *binding.template.fields}
    violations = []
    for name, values in given.items():
        try:
            if binding.body == "*":
                raise ValueError("there is no such parameter; the body holds the whole request")
            said = _nested(binding.method.input_type, name.split("."), values, taken, "")
            json_format.ParseDict(said, request)
        except _CONVERSION_ERRORS as error:
            violations.append((name, _reworded(error)))
    if violations:
        raise InvalidArgument(
            "; ".join(f"Query parameter {name!r}: {why.rstrip('.')}" for name, why in violations) + ".",
            reason="PARAMETER_INVALID",
            violations=violations,
        )


def _nested(message: Descriptor, path: list[str], values: list[str], taken: set[str], parent: str) -> dict[str, Any]:
    """The JSON object which says what a query parameter says."""
    name = path[0]
    field = message.fields_by_name.get(name) or next((f for f in message.fields if f.json_name == name), None)
    if field is None:
        raise ValueError("there is no such parameter")
    dotted = f"{parent}{field.name}"
    if dotted in taken:
        raise ValueError("it is given by the path or the body")
    if len(path) > 1:
        if field.is_repeated or field.message_type is None or field.message_type.full_name in _SCALAR_MESSAGES:
            raise ValueError("there is no such parameter")
        return {field.name: _nested(field.message_type, path[1:], values, taken, f"{dotted}.")}
    if field.message_type is not None and field.message_type.full_name not in _SCALAR_MESSAGES:
        raise ValueError("it cannot be given in the query")
    if field.is_repeated:
        return {field.name: [_leaf(field, value) for value in values]}
    if len(values) > 1:
        raise ValueError("it is given more than once")
    return {field.name: _leaf(field, values[0])}


def _leaf(field: FieldDescriptor, value: str) -> Any:
    kind = field.message_type.full_name if field.message_type is not None else ""
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL or kind == "google.protobuf.BoolValue":
        if value not in ("true", "false"):
            raise ValueError("must be true or false")
        return value == "true"
    if kind == "google.protobuf.FieldMask":  # ProtoJSON wants lowerCamelCase; we take both
        return re.sub(r"_([a-z])", lambda found: found[1].upper(), value)
    return value


def _set_path(message: Message, path: list[str], value: str) -> None:
    for name in path[:-1]:
        message = getattr(message, name)
    setattr(message, path[-1], value)


def _reworded(error: Exception) -> str:
    """What json_format says, without what only a programmer of it understands."""
    text = str(error).removeprefix("Failed to parse ").strip()
    text = re.sub(r'Message type "ekiben\.[a-z0-9.]+?\.([A-Z][\w.]*)" has no field named', r"\1 has no field", text)
    text = re.sub(r"\n?\s*Available Fields\(except extensions\):.*", "", text, flags=re.DOTALL)
    return (text[:500] or type(error).__name__).rstrip(". ") + "."
