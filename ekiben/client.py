"""Client: the platform's APIs over one channel."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ekiben import contexts
from ekiben.aliases import Aliases
from ekiben.audit import Audit
from ekiben.bentos import Bentos
from ekiben.builds import Builds
from ekiben.channel import Tls, open_channel
from ekiben.clusters import Clusters
from ekiben.deletions import Deletions
from ekiben.deployments import Deployments
from ekiben.endpoints import DEFAULT_ENDPOINT, Endpoint
from ekiben.files import Files
from ekiben.garbage import Garbage
from ekiben.images import Images
from ekiben.lineage import Lineage
from ekiben.models import Models
from ekiben.predictions import Predictions
from ekiben.quotas import Quotas
from ekiben.secrets import Secrets
from ekiben.terminals import Terminals
from ekiben.tokens import Tokens
from ekiben.traces import Traces
from ekiben.transfer import Transfer
from ekiben.users import Users


class Client:
    """One channel to a platform, and an attribute for each kind of resource. An async context manager.

    Calls have a deadline of 30 s, streams have none; a call that finds the server away is tried again within its
    deadline. `metadata` goes with each call (`traceparent`, say).
    """

    def __init__(self, endpoint: str | Endpoint, token: str = "", *, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self.endpoint = endpoint if isinstance(endpoint, Endpoint) else Endpoint.parse(endpoint)
        address = self.endpoint.url if self.endpoint.tls else self.endpoint.target
        # The variable that OpenSSL reads: one file of own roots for gRPC and for the bytes.
        roots = os.environ.get("SSL_CERT_FILE") if self.endpoint.tls else None
        tls = Tls(ca_file=Path(roots)) if roots else None
        self._channel = open_channel(address, token=token or None, tls=tls, metadata=lambda: metadata)
        transfer = Transfer(self._channel, self.endpoint)
        self.models = Models(self._channel, transfer)
        self.bentos = Bentos(self._channel, transfer)
        self.deletions = Deletions(self._channel)
        self.garbage = Garbage(self._channel)
        self.aliases = Aliases(self._channel)
        self.files = Files(self._channel, transfer)
        self.builds = Builds(self._channel)
        self.images = Images(self._channel)
        self.deployments = Deployments(self._channel)
        self.terminals = Terminals(self._channel)
        self.predictions = Predictions(self._channel)
        self.lineage = Lineage(self._channel, self.predictions)
        self.traces = Traces(self._channel)
        self.tokens = Tokens(self._channel)
        self.quotas = Quotas(self._channel)
        self.secrets = Secrets(self._channel)
        self.users = Users(self._channel)
        self.audit = Audit(self._channel)
        self.clusters = Clusters(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running calls end as Cancelled."""
        await self._channel.close(None)


def where(
    endpoint: str | None = None,
    token: str | None = None,
    *,
    context: str = "",
    env: Mapping[str, str] = os.environ,
) -> contexts.Context:
    """Which server to speak to, with which token: what is given, else the environment, else the context.

    `EKIBEN_ENDPOINT` and `EKIBEN_API_TOKEN` go before the current context that `ekiben login` keeps, a `context` that
    is named goes before them. A token of the context is never sent to another endpoint than the context's.
    Without any of these it is the endpoint at which `ekiben up` listens, without a token.
    """
    if not context:
        endpoint = endpoint or env.get("EKIBEN_ENDPOINT", "")
        token = token if token is not None else env.get("EKIBEN_API_TOKEN", "")
        if endpoint and token:
            return contexts.Context(endpoint, token)
    kept = contexts.load().get(context)
    if kept is None:
        return contexts.Context(endpoint or DEFAULT_ENDPOINT, token or "")
    same = not endpoint or Endpoint.parse(endpoint) == Endpoint.parse(kept.endpoint)
    return contexts.Context(endpoint or kept.endpoint, token or (kept.token if same else ""))


def connect(endpoint: str | None = None, token: str | None = None) -> Client:
    """A client for the platform: `async with ekiben.connect() as client`.

    Args:
        endpoint: `http(s)://host:port`, or `host:port`; see `where` for what is taken when left out.
        token: an API token (`ekb_…`); likewise.

    Raises:
        InvalidArgument: not an endpoint (ENDPOINT_INVALID).
    """
    found = where(endpoint, token)
    return Client(found.endpoint, found.token)
