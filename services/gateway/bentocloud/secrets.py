"""Secrets. Their values go in and never come out."""

from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.errors import InvalidArgument
from ekiben.identity.v1 import identity_pb2 as identity
from services.gateway.bentocloud import clusters
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.wire import Reply, last, member, page, required, resource

_KINDS = {"env": identity.Secret.ENV, "mountfile": identity.Secret.MOUNT_FILE}
_STAGES = {"all": identity.Secret.ALL, "build": identity.Secret.BUILD, "runtime": identity.Secret.RUNTIME}


async def list_all(call: Call) -> Reply:
    """GET /api/v1/org_secrets: all of them, for the client always asks for ten and for all."""
    await clusters.check(call)
    words = " ".join(filter(None, (call.query("q"), call.query("search"))))
    found = call.pages(call.api.secrets.ListSecrets, identity.ListSecretsRequest(filter=words), "secrets")
    return page([await _reply(call, secret) async for secret in found])


async def get(call: Call) -> Reply:
    """GET /api/v1/org_secrets/{name}."""
    await clusters.check(call)
    return await _reply(call, await call(call.api.secrets.GetSecret, identity.GetSecretRequest(name=_name(call))))


async def create(call: Call) -> Reply:
    """POST /api/v1/org_secrets."""
    await clusters.check(call)
    body = await call.body()
    secret = secret_of(str(names.Secret(required(body, "name"))), body)
    return await _reply(call, await call(call.api.secrets.CreateSecret, identity.CreateSecretRequest(secret=secret)))


async def update(call: Call) -> Reply:
    """PATCH /api/v1/org_secrets/{name}: the content is replaced as a whole."""
    await clusters.check(call)
    body = await call.body()
    paths = ["kind", "stage", "path", "items"] + (["description"] if body.get("description") is not None else [])
    request = identity.UpdateSecretRequest(secret=secret_of(_name(call), body), update_mask=FieldMask(paths=paths))
    return await _reply(call, await call(call.api.secrets.UpdateSecret, request))


async def delete(call: Call) -> Reply:
    """DELETE /api/v1/org_secrets/{name}."""
    await clusters.check(call)
    await call(call.api.secrets.DeleteSecret, identity.DeleteSecretRequest(name=_name(call)))
    return {}


def secret_of(name: str, body: dict[str, Any]) -> identity.Secret:
    """The secret that a request describes."""
    content = required(body, "content", dict)
    items = []
    for item in member(content, "items", list, []):
        if not isinstance(item, dict):
            raise InvalidArgument("Each item must be an object with key and value.", reason="FIELD_INVALID")
        items.append(
            identity.Secret.Item(
                key=required(item, "key"),
                sub_path=member(item, "sub_path", str, ""),
                value=member(item, "value", str, ""),
            )
        )
    return identity.Secret(
        name=name,
        description=member(body, "description", str, ""),
        kind=_chosen(_KINDS, "type", member(content, "type", str, "") or "env"),
        stage=_chosen(_STAGES, "stage", member(content, "stage", str, "") or "all"),
        path=member(content, "path", str, ""),
        items=items,
    )


def secret_reply(secret: identity.Secret, creator: Reply) -> Reply:
    """A secret, the values of its items null."""
    kinds = {value: word for word, value in _KINDS.items()}
    stages = {value: word for word, value in _STAGES.items()}
    return {
        **resource("secret", last(secret.name), secret.uid, created=secret.create_time, updated=secret.update_time),
        "description": secret.description,
        "creator": creator,
        "cluster": clusters.cluster_reply(deployer.Cluster(name=f"clusters/{clusters.DEFAULT_CLUSTER}")),
        "content": {
            "type": kinds.get(secret.kind, "env"),
            "stage": stages.get(secret.stage, "all"),
            "path": secret.path or None,
            "items": [{"key": i.key, "sub_path": i.sub_path or None, "value": None} for i in secret.items],
        },
    }


async def _reply(call: Call, secret: identity.Secret) -> Reply:
    return secret_reply(secret, await call.user(secret.creator))


def _name(call: Call) -> str:
    return str(names.Secret(call.path("secret")))


def _chosen(words: dict[str, Any], field: str, word: str) -> Any:
    if word not in words:
        raise InvalidArgument(
            f"{field!r} must be one of {', '.join(words)}, not {word[:64]!r}.", reason="FIELD_INVALID"
        )
    return words[word]
