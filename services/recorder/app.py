"""Wiring of the recorder."""

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import add_LogsServiceServicer_to_server
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import add_TraceServiceServicer_to_server

from ekiben.recorder.v1.recorder_pb2_grpc import add_PredictionsServicer_to_server, add_TracesServicer_to_server
from services.kernel.app import Component, Servicer
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import open_database
from services.kernel.peers import Peers
from services.kernel.settings import SettingsError
from services.recorder.forwarder import Forwarder, open_sender
from services.recorder.intake import Intake
from services.recorder.predictions import Predictions
from services.recorder.receiver import Receiver, listen
from services.recorder.retention import Retention
from services.recorder.servicer import OtlpLogsServicer, OtlpTraceServicer, PredictionsServicer, TracesServicer
from services.recorder.settings import Settings
from services.recorder.store import PredictionStore, TraceStore, UsageStore, Writer
from services.recorder.traces import Traces


@asynccontextmanager
async def open_recorder(settings: Settings, peers: Peers, *, clock: Clock = SYSTEM) -> AsyncIterator[Component]:
    """Everything the recorder needs, opened in order and closed in reverse. It calls no peer: `peers` is not used."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(settings))
        await database.migrate("services.recorder.migrations")
        writer = Writer(database, min_free_bytes=settings.min_free_bytes)
        prediction_store, trace_store = PredictionStore(database, writer), TraceStore(database, writer)
        predictions, traces = Predictions(prediction_store, clock), Traces(trace_store, clock)
        retention = Retention(
            prediction_store,
            trace_store,
            UsageStore(database),
            clock,
            retention_days=settings.retention_days,
            max_stored_bytes=settings.max_stored_bytes,
        )
        loops: list[Callable[[], Awaitable[None]]] = [retention.run]
        forwarder = None
        if settings.otlp_forward_endpoint:
            headers = read_headers(settings.otlp_forward_headers_file)
            sender = await stack.enter_async_context(open_sender(settings.otlp_forward_endpoint, headers))
            forwarder = Forwarder(sender, clock)
            loops.append(forwarder.run)
        intake = Intake(predictions, traces, forwarder, clock, organization=settings.organization)
        if settings.otlp_http_listen and settings.otlp_token_file:
            receiver = Receiver(intake, token_in(settings.otlp_token_file))
            await stack.enter_async_context(listen(receiver, settings.otlp_http_listen))
        yield Component(
            "recorder",
            servicers=[
                Servicer(
                    "ekiben.recorder.v1.Predictions",
                    add_PredictionsServicer_to_server,
                    PredictionsServicer(predictions),
                ),
                Servicer("ekiben.recorder.v1.Traces", add_TracesServicer_to_server, TracesServicer(traces)),
                Servicer(
                    "opentelemetry.proto.collector.trace.v1.TraceService",
                    add_TraceServiceServicer_to_server,
                    OtlpTraceServicer(intake),
                ),
                Servicer(
                    "opentelemetry.proto.collector.logs.v1.LogsService",
                    add_LogsServiceServicer_to_server,
                    OtlpLogsServicer(intake),
                ),
            ],
            loops=loops,
            ready=database.ping,
        )


def token_in(path: Path) -> str:
    """The OTLP token in `path`; a new one, readable by the owner only, where there is no file yet.

    Deployer and recorder may start at once: the file appears whole, and whoever comes second reads the first one's.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        try:
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
        finally:
            temporary.unlink()
        return path.read_text().strip()


def read_headers(path: Path | None) -> dict[str, str]:
    """Headers from a file of lines `name: value`; none without a file.

    Raises:
        SettingsError: a line has another form.
    """
    headers: dict[str, str] = {}
    for line in path.read_text().splitlines() if path else ():
        name, colon, value = line.partition(":")
        if line.strip() and not colon:
            raise SettingsError([f"{path}: a line is not of the form `name: value`."])
        if line.strip():
            headers[name.strip().lower()] = value.strip()
    return headers
