"""The one public port: the API for people and programs, and the data plane for predictions.

Envoy is the data plane. Python programs it and reads what it writes down, and never stands between a request and a
replica.

Terms: a *host* is a deployment's own name under the domain; a deployment's *own port* is a listener that serves nothing
else; a *peer* is another service of the suite; a *capture* is one prediction as Envoy's log holds it.
Invariants: a route is acknowledged to the deployer only once Envoy uses it; a capture leaves the log only once the
recorder has kept it; nothing here is lost that a restart cannot read again from the files below `data_dir`.

Reading order: `domain` (the route table), `messages` (clusters as Envoy's resources) and `sockets` (how their
connections notice lost peers), `routes`, `listeners` (with the filters; what captures is `capture.c` or
`capture.lua`), `xds` (the files), `envoy` (the process and its admin interface), `watcher` (the loop that joins
them), `records` and `captures` (the log's way to the recorder), `admission`, `exposition` and `metrics`, `app`. The
HTTP front is `http`, `transcoder`, `openapi` and `bentocloud`.
"""
