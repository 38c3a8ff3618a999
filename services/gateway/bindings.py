"""Which HTTP requests stand for which gRPC methods, read from the `google.api.http` annotations of the protos.

A method without the annotation is internal and appears nowhere here.
Source: google/api/http.proto, "Path template syntax".
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from google.api import annotations_pb2
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from ekiben.builder.v1 import builder_pb2, images_pb2
from ekiben.deployer.v1 import clusters_pb2, deployer_pb2, events_pb2, terminals_pb2
from ekiben.errors import InvalidArgument
from ekiben.identity.v1 import identity_pb2
from ekiben.recorder.v1 import recorder_pb2
from ekiben.registry.v1 import (
    aliases_pb2,
    deletions_pb2,
    files_pb2,
    garbage_pb2,
    lineage_pb2,
    quotas_pb2,
    registry_pb2,
)

API_FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR
    for module in (
        registry_pb2,
        aliases_pb2,
        deletions_pb2,
        files_pb2,
        garbage_pb2,
        lineage_pb2,
        quotas_pb2,
        identity_pb2,
        builder_pb2,
        images_pb2,
        deployer_pb2,
        events_pb2,
        clusters_pb2,
        terminals_pb2,
        recorder_pb2,
    )
)
"""Every file of the public API."""

PEERS: Mapping[str, str] = {
    "ekiben.registry.v1": "registry",
    "ekiben.identity.v1": "registry",
    "ekiben.builder.v1": "builder",
    "ekiben.deployer.v1": "deployer",
    "ekiben.recorder.v1": "recorder",
}
"""Which peer serves a proto package."""

_SEGMENT = r"[^/:]+"  # a colon starts a custom verb, and no id of the suite holds one
_SEGMENTS = r"[^:]+"
_TOKEN = re.compile(r"\{(?P<field>[a-z0-9_.]+)(?:=(?P<template>[^{}]+))?\}|(?P<literal>[^{}]+)")


@dataclass(frozen=True)
class Template:
    """A path template such as `/v1/{name=builds/*}:cancel`."""

    text: str
    pattern: re.Pattern[str]
    fields: tuple[str, ...]
    """Dotted proto field paths, in the order of the pattern's groups."""
    parts: tuple[tuple[str, str], ...]
    """`(literal, "")` or `(field, template)`, in order: what an API reference prints."""

    def match(self, raw_path: str) -> dict[str, str] | None:
        """The values of the template's fields, percent-decoded, or None where the path is another one.

        `%2F` stays as it is in a field of more than one segment, so that a value cannot reach another resource.

        Raises:
            InvalidArgument: the path does not decode to UTF-8 (PATH_INVALID).
        """
        found = self.pattern.fullmatch(raw_path)
        if found is None:
            return None
        return {field: _decoded(value) for field, value in zip(self.fields, found.groups(), strict=True)}


@dataclass(frozen=True)
class Binding:
    """One HTTP verb and path of one method."""

    method: MethodDescriptor
    verb: str
    template: Template
    body: str
    """Name of the field that the body holds, `*` for the whole request, or empty for no body."""

    @property
    def rpc(self) -> str:
        """What gRPC calls the method: `/ekiben.registry.v1.Models/GetModel`."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def input(self) -> type[Message]:
        """Class of the request."""
        return GetMessageClass(self.method.input_type)

    @property
    def output(self) -> type[Message]:
        """Class of the response, or of each message of a stream."""
        return GetMessageClass(self.method.output_type)

    @property
    def streams(self) -> bool:
        """True where the response is a stream."""
        return bool(self.method.server_streaming)


class RoutingTable:
    """All bindings, found by path."""

    def __init__(self, bindings: Iterable[Binding]) -> None:
        self.bindings: Sequence[Binding] = tuple(bindings)
        self._by_collection: dict[str, list[Binding]] = {}
        for binding in self.bindings:
            self._by_collection.setdefault(_collection(binding.template.text), []).append(binding)

    def find(self, raw_path: str) -> dict[str, tuple[Binding, dict[str, str]]]:
        """Bindings of a path by HTTP verb, each with the values that the path gives; empty for an unknown path."""
        found: dict[str, tuple[Binding, dict[str, str]]] = {}
        for binding in self._by_collection.get(_collection(raw_path), ()):
            values = binding.template.match(raw_path)
            if values is not None:
                found.setdefault(binding.verb, (binding, values))
        return found


def read_bindings(files: Iterable[FileDescriptor] = API_FILES) -> Iterator[Binding]:
    """Every binding of every method that has one, in the order of the files."""
    for file in files:
        for service in file.services_by_name.values():
            for method in service.methods:
                # HTTP answers one request; what goes both ways is gRPC's alone, and Envoy knows its path all the same.
                if method.GetOptions().HasExtension(annotations_pb2.http) and not method.client_streaming:
                    yield from _bindings_of(method, method.GetOptions().Extensions[annotations_pb2.http])


def parse_template(text: str) -> Template:
    """Read a path template. The protos are ours and linted, so a bad one is a ValueError at start."""
    path, colon, verb = text.rpartition(":") if ":" in text else (text, "", "")
    pattern, fields, parts = "", [], []
    for token in _TOKEN.finditer(path):
        if literal := token["literal"]:
            pattern += re.escape(literal)
            parts.append((literal, ""))
        else:
            inner = token["template"] or "*"
            fields.append(token["field"])
            parts.append((token["field"], inner))
            wild = {"*": _SEGMENT, "**": _SEGMENTS}
            pattern += "(" + "/".join(wild.get(segment, re.escape(segment)) for segment in inner.split("/")) + ")"
    if colon:
        pattern += re.escape(":" + verb)
        parts.append((":" + verb, ""))
    if "".join(token[0] for token in _TOKEN.finditer(path)) != path:
        raise ValueError(f"Path template {text!r} cannot be read.")
    return Template(text, re.compile(pattern), tuple(fields), tuple(parts))


def _bindings_of(method: MethodDescriptor, rule: Any) -> Iterator[Binding]:
    for each in (rule, *rule.additional_bindings):
        verb, path = _verb_and_path(each)
        yield Binding(method, verb, parse_template(path), each.body)


def _verb_and_path(rule: HttpRule) -> tuple[str, str]:
    kind = rule.WhichOneof("pattern")
    if kind == "custom":
        return rule.custom.kind.upper(), rule.custom.path
    if kind is None:
        raise ValueError("An HTTP rule without a path cannot be served.")
    return kind.upper(), getattr(rule, kind)


def _collection(path: str) -> str:
    """The first word after the version: `models` of `/v1/models/x`, `/v1/models:sign` and `/v1/{name=models/*}`."""
    words = path.split("/", 3)
    return words[2].rpartition("=")[2].partition(":")[0] if len(words) > 2 else ""


def _decoded(value: str) -> str:
    several = "/" in value
    segments = []
    for segment in value.split("/"):
        try:
            text = unquote(segment, errors="strict")
        except UnicodeDecodeError as error:
            raise InvalidArgument("The path is not UTF-8 once percent-decoded.", reason="PATH_INVALID") from error
        segments.append(text.replace("/", "%2F") if several else text)
    return "/".join(segments)
