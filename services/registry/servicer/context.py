"""The type of a call's context; nothing here uses it, since the interceptors do what it is for."""

from typing import Any

from grpc import aio

Context = aio.ServicerContext[Any, Any]
