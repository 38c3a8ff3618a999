"""The first program of a replica whose pod sends spans and monitored values: sets them up, and becomes the server.

It also has calls to other services keep their connections, which BentoML 1.4.31 and later end at each hundredth call
with the calls that are on them (issue 5540 of BentoML). Not for ever: after five minutes new pods get calls too.

Usage: `python -c TEXT COMMAND ARGUMENT…`, with EKIBEN_TELEMETRY as `telemetry.py` writes it, and perhaps
EKIBEN_OTLP_TOKEN. What the image can send is seen here: BentoML fails when told to send what it has no exporter for.
Without a token nothing is sent; what the user has set wins.

Standard library only, and Python 3.7: images bring old environments.
"""

# mypy: ignore-errors
# ruff: noqa: PTH103, PTH118, PTH120

import importlib
import importlib.util
import json
import os
import sys

TRACES = (("opentelemetry.exporter.otlp.proto.http.trace_exporter", "OTLPSpanExporter"),)
MONITORS = (
    ("opentelemetry._logs", "set_logger_provider"),
    ("opentelemetry.sdk._logs", "LoggingHandler"),
    ("opentelemetry.exporter.otlp.proto.grpc._log_exporter", "OTLPLogExporter"),
    ("opentelemetry.exporter.otlp.proto.http._log_exporter", "OTLPLogExporter"),
)


def there(names):
    """Whether all of these can be imported."""
    try:
        return all(hasattr(importlib.import_module(module), name) for module, name in names)
    except Exception:  # It is broken: then it is as good as not there.
        return False


def counts_calls():
    """Whether BentoML has the setting of how many calls a connection is for; another one does not start with it."""
    try:
        folder = os.path.dirname(importlib.util.find_spec("_bentoml_sdk").origin)
        with open(os.path.join(folder, "service", "config.py"), encoding="utf-8") as file:
            return "runner_connection:" in file.read()
    except (AttributeError, ImportError, OSError, TypeError):
        return False


def merged(base, over):
    """Both, `over` winning at each leaf."""
    both = dict(base)
    for key, value in over.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def configured(told, sends):
    """BentoML's configuration of a service."""
    config = {"monitoring": {"enabled": True, "type": "default", "options": {"log_path": told["folder"]}}}
    if sends and there(TRACES):
        config["tracing"] = told["tracing"]
    if sends and there(MONITORS):
        config["monitoring"] = told["monitoring"]
    return config


def prepare(env):
    """Change the environment."""
    told, token = json.loads(env.pop("EKIBEN_TELEMETRY")), env.pop("EKIBEN_OTLP_TOKEN", "")
    replica = env.pop("EKIBEN_REPLICA", "")
    described = told["attributes"] + (",ekiben.replica=" + replica if replica else "")
    known = env.get("OTEL_RESOURCE_ATTRIBUTES")
    env["OTEL_RESOURCE_ATTRIBUTES"] = known + "," + described if known else described
    if token:
        env.setdefault("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20" + token)
    sends = bool(env.get("OTEL_EXPORTER_OTLP_HEADERS"))
    # A prediction is there after a second, and its spans beside it; by default they would come five seconds later.
    env.setdefault("OTEL_BSP_SCHEDULE_DELAY", "500")
    env.setdefault("OTEL_BLRP_SCHEDULE_DELAY", "500")
    # In seconds; what is not taken by then is given up. 10 by default are less than a restart of the recorder can take.
    env.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", "20")
    config = configured(told, sends)
    if told["service"]:
        services = json.loads(env.get("BENTOML_CONFIG_OVERRIDES") or "{}").get("services", {})
        services[told["service"]] = merged(config, services.get(told["service"], {}))
        for name in told.get("calls", ()) if counts_calls() else ():
            services[name] = merged({"runner_connection": {"max_requests": 2**31 - 1}}, services.get(name, {}))
        env["BENTOML_CONFIG_OVERRIDES"] = json.dumps({"services": services})
        return
    # Before 1.2: its monitor takes an endpoint for the base of one, so that an option would give /v1/logs twice.
    if config["monitoring"]["type"] == "otlp":
        config["monitoring"]["options"] = {}
    if sends:
        env.setdefault("OTEL_EXPORTER_OTLP_ENDPOINT", told["endpoint"])
    if "BENTOML_CONFIG" not in env:
        env["BENTOML_CONFIG"] = os.path.join(told["folder"], "bentoml.yaml")
        os.makedirs(told["folder"], exist_ok=True)
        with open(env["BENTOML_CONFIG"], "w") as file:
            json.dump(merged(dict(config, version=1), told["config"]), file)


if __name__ == "__main__":
    prepare(os.environ)
    os.execvp(sys.argv[1], sys.argv[1:])
