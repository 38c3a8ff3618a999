"""Server reflection in both its names: v1, which tools ask for first, and v1alpha, which older ones know.

grpcio-reflection has v1alpha only. v1 is the same on the wire, message for message: its descriptors are made from those
of v1alpha, so that a client that asks for them too finds them.
"""

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

_OLD = "grpc.reflection.v1alpha"
_NEW = "grpc.reflection.v1"
SERVICE = f"{_NEW}.ServerReflection"


def add(services: Iterable[str], server: aio.Server) -> None:
    """Let `server` tell anyone about `services` and about reflection itself."""
    _describe()
    names = (*services, reflection.SERVICE_NAME, SERVICE)
    reflection.enable_server_reflection(names, server)
    # The servicer's answers are v1alpha's messages; their bytes are v1's.
    handler = grpc.stream_stream_rpc_method_handler(
        ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ServerReflectionInfo": handler}),))


def _describe() -> None:
    """Put the descriptors of v1 into the default pool, unless they are there."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(SERVICE)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
        file.name, file.package = "grpc/reflection/v1/reflection.proto", _NEW
        for field in (field for message in file.message_type for field in message.field if field.type_name):
            field.type_name = field.type_name.replace(f".{_OLD}.", f".{_NEW}.")
        for method in (method for service in file.service for method in service.method):
            method.input_type = method.input_type.replace(f".{_OLD}.", f".{_NEW}.")
            method.output_type = method.output_type.replace(f".{_OLD}.", f".{_NEW}.")
        pool.AddSerializedFile(file.SerializeToString())
