"""Who may call a method: read from the method's descriptor, so that the proto is the only place that says it."""

from dataclasses import dataclass

from google.protobuf import descriptor_pool

from ekiben.api.v1 import annotations_pb2
from ekiben.api.v1.annotations_pb2 import Role


@dataclass(frozen=True)
class Policy:
    """What the interceptors know of a method."""

    role: int
    """The least role that may call it; ROLE_UNSPECIFIED refuses everybody."""
    audited: bool = False
    """Whether each call is written down."""
    observed: bool = True
    """Whether calls are traced and logged: not health checks, and not the receivers of traces themselves."""
    request_type: str = ""
    """Full name of the request message."""


# Services which are not ours, so that their protos cannot say it.
_FOREIGN = {
    "grpc.health.v1.": Policy(Role.ROLE_ANYONE, observed=False),
    "grpc.reflection.": Policy(Role.ROLE_ANYONE, observed=False),
    "opentelemetry.proto.collector.": Policy(Role.ROLE_SERVICE, observed=False),
}


def policy_of(method: str) -> Policy:
    """The policy of `method`, given as `ekiben.registry.v1.Models/GetModel`; one nobody described is refused to all."""
    for prefix, policy in _FOREIGN.items():
        if method.startswith(prefix):
            return policy
    service, _, name = method.partition("/")
    try:
        descriptor = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    except KeyError:
        return Policy(Role.ROLE_UNSPECIFIED)
    options = descriptor.GetOptions()
    declared = options.Extensions[annotations_pb2.policy]
    return Policy(declared.role, declared.audited, request_type=descriptor.input_type.full_name)
