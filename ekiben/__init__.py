"""Ekiben: the public client, the command line and the generated code of its APIs.

The promised surface is what this module lists; everything else may change between releases.

    connect(endpoint, token) ── Client ─┬─ .models        model repositories and models; upload, download
                                        ├─ .bentos        bento repositories and bentos; upload, download
                                        ├─ .aliases       names that move from version to version; their history
                                        ├─ .builds        start, follow and cancel builds; their logs
                                        ├─ .deployments   create, update, scale, roll back, follow; replicas, logs
                                        ├─ .predictions   the prediction log: find, read, tail
                                        ├─ .traces        what each hop of a request did
                                        ├─ .tokens        API tokens
                                        ├─ .secrets       values that replicas and builds get
                                        ├─ .quotas        what the organization may keep, and keeps
                                        ├─ .users         users, organization, who the caller is
                                        ├─ .audit         what was done, by whom, and what was refused
                                        └─ .clusters      where replicas run, and the sizes they may have

Every method raises the classes of `ekiben.errors`, all of them an `EkibenError`. Names are resource
names (`modelRepositories/iris/models/v1`); `ekiben.names` parses and formats them.

    async with ekiben.connect() as client:
        async for deployment in client.deployments.list():
            print(deployment.name, deployment.urls)

Importing this package costs nothing: what is listed is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ekiben.client import Client, connect
    from ekiben.errors import (
        Aborted,
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        EkibenError,
        FailedPrecondition,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
    )

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "EkibenError",
    "FailedPrecondition",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "connect",
]

_FROM_CLIENT = frozenset({"Client", "connect"})


def __getattr__(name: str) -> object:
    """Import a promised name when it is first asked for (PEP 562), so that `ekiben --help` need not load gRPC."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ekiben.client" if name in _FROM_CLIENT else "ekiben.errors"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
