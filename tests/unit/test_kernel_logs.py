"""Log lines carry fields and ids."""

import json
import logging

from services.kernel import identity
from services.kernel.logs import JsonFormatter, TextFormatter


def _record(**extra: object) -> logging.LogRecord:
    return logging.getLogger("services.x").makeRecord(
        "services.x", logging.INFO, "f.py", 1, "build %s", ("done",), None, extra=extra
    )


def test_json_lines_hold_the_fields_and_the_request_id() -> None:
    identity.set_caller(identity.Caller(request_id="r1"))
    try:
        line = json.loads(JsonFormatter().format(_record(duration_s=1.5)))
    finally:
        identity.set_caller(None)
    assert (line["message"], line["duration_s"], line["request_id"], line["level"]) == ("build done", 1.5, "r1", "INFO")


def test_text_lines_quote_what_would_break_them() -> None:
    line = TextFormatter().format(_record(name_of="a b\nc", empty=""))
    assert 'name_of="a b\\nc"' in line and 'empty=""' in line and "\n" not in line
