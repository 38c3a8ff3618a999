"""Log lines: a constant message, values as fields, and the call and trace that they belong to."""

import json
import logging
import sys
from datetime import UTC, datetime

from opentelemetry import trace

from services.kernel import identity
from services.kernel.settings import ServerSettings

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m"}


def setup(settings: ServerSettings) -> None:
    """Send all log lines of the process to standard error in the form that `settings` name; later calls replace it."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(handler)
    ours = _Handler(sys.stderr)
    ours.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter(sys.stderr.isatty()))
    root.addHandler(ours)
    root.setLevel(settings.log_level.upper())
    # grpcio logs a traceback at ERROR for each call that its client cancels; the access log says so in one line.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    for noisy in ("aiosqlite", "asyncio", "aiohttp.access", "alembic", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Ours, so that setting up twice leaves one."""


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """The record's own fields, then the ids of the call and the trace that it was written in."""
    fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    caller = identity.current_caller()
    if caller is not None and caller.request_id:
        fields.setdefault("request_id", caller.request_id)
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        fields.setdefault("trace_id", trace.format_trace_id(span.trace_id))
    return fields


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for a person: time, level, where, what, then fields as key=value."""

    def __init__(self, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        level = f"{record.levelname:<7}"
        if self._colour and record.levelname in _COLOURS:
            level = f"{_COLOURS[record.levelname]}{level}\x1b[0m"
        fields = "".join(f" {key}={_shown(value)}" for key, value in fields_of(record).items())
        line = f"{time} {level} {record.name.removeprefix('services.')}: {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _shown(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "\n=') else text
