"""The OpenAPI 3.1 document of the HTTP API, from the protos' descriptors and their comments.

Generated code has no comments, so they are read from `ekiben/api/descriptors.binpb`, which is generated with it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata, resources
from typing import Any

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorSet

from ekiben.api.v1 import annotations_pb2 as api
from services.gateway.bindings import API_FILES, Binding, read_bindings

Schema = dict[str, Any]

_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_DOUBLE: {"type": ["number", "string"], "format": "double"},
    FieldDescriptor.TYPE_FLOAT: {"type": ["number", "string"], "format": "float"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "format": "int32", "minimum": 0},
    # ProtoJSON writes these as strings, for JavaScript's sake, and reads both.
    FieldDescriptor.TYPE_INT64: {"type": ["string", "integer"], "format": "int64"},
    FieldDescriptor.TYPE_UINT64: {"type": ["string", "integer"], "format": "int64"},
}
_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$", "examples": ["1.5s"]},
    "google.protobuf.FieldMask": {"type": "string", "examples": ["description,labels"]},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.Empty": {"type": "object", "additionalProperties": False},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "additionalProperties": True,
    },
}
_PROBLEM: Schema = {
    "type": "object",
    "description": "What went wrong (RFC 9457).",
    "properties": {
        "type": {"type": "string", "description": "Where the reason is explained."},
        "title": {"type": "string", "description": "The kind of problem, in short."},
        "status": {"type": "integer", "description": "The HTTP status."},
        "detail": {"type": "string", "description": "What is wrong here, then what to do."},
        "instance": {"type": "string", "description": "The request's id as a URI."},
        "code": {"type": "string", "description": "The name of the gRPC status code."},
        "reason": {"type": "string", "description": "The reason for programs; it is kept for ever."},
        "metadata": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "Each value that the detail mentions.",
        },
        "violations": {
            "type": "array",
            "items": {"type": "object"},
            "description": "What is wrong with each field.",
        },
    },
}
_ABOUT = """Everything that Ekiben offers over HTTP/JSON: each method of its gRPC services, from the same protos.

Send an API token as `Authorization: Bearer …`. Errors are problem documents (RFC 9457). Lists come in pages:
repeat the request with `pageToken`. Streams are newline-delimited JSON, one message a line, each sent at once;
an error in the middle of one is a last line `{"error": …}`. Fields may be written in lowerCamelCase or as in the
protos. 64-bit integers are strings."""


def document() -> Schema:
    """The whole document."""
    return _Writer().document()


class Comments:
    """Comments of the protos by the full name of what they are about."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self._by_name: dict[str, str] = {}
        for file in files.file:
            comments = {tuple(at.path): _tidy(at.leading_comments) for at in file.source_code_info.location}
            for name, path in _paths(file.package, file.message_type, file.enum_type):
                self._by_name[name] = comments.get(path, "")
            for i, service in enumerate(file.service):
                self._by_name[f"{file.package}.{service.name}"] = comments.get((6, i), "")
                for j, method in enumerate(service.method):
                    name = f"{file.package}.{service.name}.{method.name}"
                    self._by_name[name] = comments.get((6, i, 2, j), "")

    def of(self, full_name: str) -> str:
        """The comment, empty where there is none."""
        return self._by_name.get(full_name, "")


def read_comments() -> Comments:
    """The comments that were generated with the code."""
    data = (resources.files("ekiben.api") / "descriptors.binpb").read_bytes()
    return Comments(FileDescriptorSet.FromString(data))


def openapi_path(binding: Binding) -> tuple[str, list[tuple[str, str]]]:
    """A binding's path as OpenAPI writes it, and its parameters with the field that each belongs to.

    `/v1/{name=builds/*}:cancel` is `/v1/builds/{build}:cancel` with `[("build", "name")]`.
    """
    path, parameters = "", []
    for text, template in binding.template.parts:
        if not template:
            path += text
            continue
        ids = iter(_ids_of(template))
        segments = []
        for segment in template.split("/"):
            if segment in ("*", "**"):
                id_ = next(ids)
                parameters.append((id_, text))
                segments.append(f"{{{id_}}}")
            else:
                segments.append(segment)
        path += "/".join(segments)
    return path, parameters


class _Writer:
    def __init__(self) -> None:
        self._comments = read_comments()
        self._schemas: dict[str, Schema] = {"Problem": _PROBLEM}

    def document(self) -> Schema:
        paths: dict[str, Schema] = {}
        tags: dict[str, Schema] = {}
        described: Counter[str] = Counter()
        for binding in read_bindings():
            path, _ = openapi_path(binding)
            operation = self._operation(binding)
            described[operation["operationId"]] += 1
            # A method with several paths has an operation for each, and their ids must differ.
            if (count := described[operation["operationId"]]) > 1:
                operation["operationId"] += f"_{count}"
            paths.setdefault(path, {})[binding.verb.lower()] = operation
            service = binding.method.containing_service
            tags[service.name] = {"name": service.name, "description": self._comments.of(service.full_name)}
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "Ekiben",
                "version": _version(),
                "description": _ABOUT,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "security": [{"bearer": []}, {"yatai": []}],
            "tags": list(tags.values()),
            "paths": paths,
            "components": {
                "schemas": dict(sorted(self._schemas.items())),
                "responses": {
                    "Problem": {
                        "description": "It did not work.",
                        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
                    }
                },
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer", "description": "An API token."},
                    "yatai": {
                        "type": "apiKey",
                        "in": "header",
                        "name": "X-YATAI-API-TOKEN",
                        "description": "The same token, as BentoML's client sends it.",
                    },
                },
            },
        }

    def _operation(self, binding: Binding) -> Schema:
        method = binding.method
        about, role = self._comments.of(method.full_name), _role(binding)
        operation: Schema = {
            "operationId": f"{method.containing_service.name}_{method.name}",
            "tags": [method.containing_service.name],
            "summary": re.split(r"(?<=[a-z`0-9)])[.:;](?:\s|$)", about, maxsplit=1)[0],
            "description": f"{about}\n\n{_need(role)} gRPC: `{binding.rpc[1:]}`.",
        }
        if parameters := [*self._path_parameters(binding), *self._query_parameters(binding)]:
            operation["parameters"] = parameters
        if binding.body:
            field = method.input_type.fields_by_name.get(binding.body)
            schema = self._message((field and field.message_type) or method.input_type)
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        if role == api.ROLE_ANYONE:
            operation["security"] = []
        operation["responses"] = {"200": self._response(binding), "default": {"$ref": "#/components/responses/Problem"}}
        return operation

    def _response(self, binding: Binding) -> Schema:
        schema = self._message(binding.method.output_type)
        name = binding.method.output_type.name
        if binding.streams:
            return {
                "description": f"A stream: one {name} a line, each sent at once.",
                "content": {"application/x-ndjson": {"schema": {"type": "string"}, "x-itemSchema": schema}},
            }
        about = self._comments.of(binding.method.output_type.full_name) or "Nothing to say."
        return {"description": about, "content": {"application/json": {"schema": schema}}}

    def _path_parameters(self, binding: Binding) -> Iterator[Schema]:
        _, parameters = openapi_path(binding)
        for id_, field in parameters:
            yield {
                "name": id_,
                "in": "path",
                "required": True,
                "description": f"An id in `{field}`: {self._comments.of(_field(binding.method.input_type, field))}",
                "schema": {"type": "string", "minLength": 1, "pattern": "^[^/:]+$"},
            }

    def _query_parameters(self, binding: Binding) -> Iterator[Schema]:
        taken = {binding.body, *binding.template.fields}
        if binding.body == "*":
            return
        for field in binding.method.input_type.fields:
            if field.name in taken:
                continue
            schema = self._field(field)
            if "$ref" in schema and field.enum_type is None:
                continue  # a message cannot be told in a query
            yield {
                "name": field.json_name,
                "in": "query",
                "description": self._comments.of(field.full_name),
                "schema": schema,
            }

    def _message(self, message: Descriptor) -> Schema:
        if message.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message.full_name])
        name = _schema_name(message)
        if name not in self._schemas:
            schema: Schema = {"type": "object", "description": self._comments.of(message.full_name)}
            self._schemas[name] = schema  # before its fields: messages may hold themselves
            schema["properties"] = {field.json_name: self._property(field) for field in message.fields}
            schema["additionalProperties"] = False
        return {"$ref": f"#/components/schemas/{name}"}

    def _property(self, field: FieldDescriptor) -> Schema:
        schema: Schema = {**self._field(field), "description": self._comments.of(field.full_name)}
        behaviour = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        if field_behavior_pb2.OUTPUT_ONLY in behaviour:
            schema["readOnly"] = True
        if field_behavior_pb2.INPUT_ONLY in behaviour:
            schema["writeOnly"] = True
        return schema

    def _field(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": self._field(field.message_type.fields_by_name["value"])}
        one: Schema
        if field.message_type is not None:
            one = self._message(field.message_type)
        elif field.enum_type is not None:
            one = self._enum(field.enum_type)
        else:
            one = dict(_SCALARS[field.type])
        return {"type": "array", "items": one} if field.is_repeated else one

    def _enum(self, enum: EnumDescriptor) -> Schema:
        name = _schema_name(enum)
        if name not in self._schemas:
            lines = [
                f"- `{value.name}`: {self._comments.of(f'{enum.full_name}.{value.name}')}" for value in enum.values
            ]
            self._schemas[name] = {
                "type": "string",
                "enum": [value.name for value in enum.values],
                "description": "\n".join([self._comments.of(enum.full_name), "", *lines]),
            }
        return {"$ref": f"#/components/schemas/{name}"}


def _paths(
    prefix: str, messages: Iterable[DescriptorProto], enums: Iterable[EnumDescriptorProto], at: Sequence[int] = ()
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Full name and source path of every message, field, enum and value; numbers of descriptor.proto's fields."""
    message_at, enum_at = ((*at, 3), (*at, 4)) if at else ((4,), (5,))
    for i, message in enumerate(messages):
        name, path = f"{prefix}.{message.name}", (*message_at, i)
        yield name, path
        for j, field in enumerate(message.field):
            yield f"{name}.{field.name}", (*path, 2, j)
        yield from _paths(name, message.nested_type, message.enum_type, path)
    for i, enum in enumerate(enums):
        name, path = f"{prefix}.{enum.name}", (*enum_at, i)
        yield name, path
        for j, value in enumerate(enum.value):
            yield f"{name}.{value.name}", (*path, 2, j)


def _tidy(comment: str) -> str:
    return "\n".join(line.removeprefix(" ").rstrip() for line in comment.strip("\n").split("\n")).strip()


def _role(binding: Binding) -> api.Role.ValueType:
    return binding.method.GetOptions().Extensions[api.policy].role


def _need(role: api.Role.ValueType) -> str:
    if role == api.ROLE_ANYONE:
        return "Needs no token."
    return f"Needs the role {api.Role.Name(role).removeprefix('ROLE_').lower()}."


def _field(message: Descriptor, dotted: str) -> str:
    """Full name of a field by its path from a message."""
    first, _, rest = dotted.partition(".")
    inner = message.fields_by_name[first].message_type
    return _field(inner, rest) if rest and inner is not None else f"{message.full_name}.{first}"


def _schema_name(kind: Descriptor | EnumDescriptor) -> str:
    package = kind.file.package
    name = kind.full_name.removeprefix(package + ".")
    return name if package.startswith("ekiben.") else kind.full_name


def _ids_of(template: str) -> list[str]:
    """What to call the ids of `models/*`: as its resource does, else the singular of each collection."""
    for file in API_FILES:
        for message in file.message_types_by_name.values():
            for pattern in message.GetOptions().Extensions[resource_pb2.resource].pattern:
                if re.sub(r"\{[a-z_]+\}", "*", pattern) == template:
                    return re.findall(r"\{([a-z_]+)\}", pattern)
    collections = template.split("/")[0::2]
    return [re.sub(r"s$", "", collection) for collection in collections]


def _version() -> str:
    try:
        return metadata.version("ekiben")
    except metadata.PackageNotFoundError:
        return "0"
