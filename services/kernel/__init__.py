"""How any service of the suite runs, whatever it is about.

The rule for entry: three services use it, and it knows none of them. No noun of the domain comes in,
but for the caller's identity, which every call has.

    app          Component, and serve(components): listen, health, signals, loops, the order of draining
    server       the grpc.aio server: limits, keepalive, TLS, health; reflecting says what it serves
    interceptors what happens around every call, in one order: calls (ids, span, deadline, access line, metrics),
                 policies (who may call a method, from its descriptor), audit (what is written down)
    identity     Principal, and the ports Authenticator and Auditor
    peers        channels to the other services, with the service token
    db           engines for SQLite and PostgreSQL, transactions; lookups: one SELECT without a transaction;
                 migrations runs a service's Alembic history; postgres dials, outages says what an error means
    leases       who holds what, by signs of life             news      wake-ups among processes, by NOTIFY
    pages        page tokens        updates   field masks, etags       watches   in-process wake-ups
    settings     frozen dataclasses from the environment
    telemetry    traces             logs      log lines                monitoring   the port with /metrics
    sites        an aiohttp application at an address
    problems     errors as RFC 9457 problems
    clock        the time, so that tests can set it
    processes    supervised trees of child processes, with shim as their root
"""
