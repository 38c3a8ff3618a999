"""BentoML's wire protocol: what the unmodified `bentoml` command of 1.0, 1.1 and 1.4 speaks, translated to gRPC.

Nothing here decides anything that another caller could not get over gRPC, and nothing is kept between two requests.
Each file holds one resource: handlers that read a request, call a peer in the caller's name, and answer; and pure
functions from protos to the replies.

What the clients insist on, and what every reply here therefore does: success is exactly 200; each key is present;
a string is never null (the client would read "None"); a list or map is never null; a time is ISO 8601 with `Z`;
`name` of a model or a bento equals its `version`; lists are newest first.

    wire.py            reading requests; times, labels and the members that every resource has
    api.py             the peers' stubs, the caller's metadata, and errors as `{"error": …}`
    routes.py          every path of the protocol
    auth.py            who am I, and login through a browser
    manifests.py       manifests: kept to the letter, completed in replies
    repositories.py    model and bento repositories
    versions.py        models and bentos
    uploads.py         bytes in and out: presigned, multipart, proxied
    deployments.py     deployments of 1.4; deployment_replies.py and deployment_requests.py translate
    old_deployments.py what 1.0 and 1.1 can say of deployments
    clusters.py        clusters and instance types
    secrets.py         secrets
    api_tokens.py      API tokens
    pods.py            websockets: pods, build logs, logs
"""
