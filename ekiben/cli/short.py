"""Short names, as people write them, made whole: `iris:v1`, `demo`, or a resource name as it is."""

import re

from ekiben import names
from ekiben.errors import InvalidArgument

_COLLECTIONS: dict[str, type[names.ResourceName]] = {
    "deployments": names.Deployment,
    "builds": names.Build,
    "images": names.Image,
    "predictions": names.Prediction,
    "traces": names.Trace,
    "apiTokens": names.ApiToken,
    "users": names.User,
    "secrets": names.Secret,
    "modelRepositories": names.ModelRepository,
    "bentoRepositories": names.BentoRepository,
    "clusters": names.Cluster,
}


def resource(collection: str, text: str) -> str:
    """The resource name for an id, or the name itself, checked.

    Raises:
        InvalidArgument: neither (NAME_INVALID).
    """
    whole = text if "/" in text else f"{collection}/{text}"
    return str(_COLLECTIONS[collection].parse(whole))


def model(text: str) -> str:
    """A model's resource name for `iris:v1`, `iris:production` (an alias), `iris` (the latest) or the name itself."""
    return str(names.Model.parse(text) if "/" in text else names.Model.from_tag(text))


def bento(text: str) -> str:
    """A bento's resource name for `demo:v1`, `demo:production` (an alias), `demo` (the latest) or the name itself."""
    return str(names.Bento.parse(text) if "/" in text else names.Bento.from_tag(text))


def alias(kind: str, text: str) -> str:
    """An alias's resource name for `iris:production` or the name itself; `kind` is `models` or `bentos`.

    Raises:
        InvalidArgument: neither (NAME_INVALID), or an alias is missing (ALIAS_REQUIRED).
    """
    made = names.ModelAlias if kind == "models" else names.BentoAlias
    if "/" in text:
        return str(made.parse(text))
    repository, colon, id_ = text.partition(":")
    if not colon:
        raise InvalidArgument(f"Say which alias of {text!r}: {text}:ALIAS.", reason="ALIAS_REQUIRED", name=text)
    return str(made(repository, id_))


def revision(deployment: str, text: str) -> str:
    """A revision's resource name for `3`, or the name itself."""
    return str(names.Revision.parse(text if "/" in text else f"{deployment}/revisions/{text}"))


def any_revision(text: str) -> str:
    """A revision's resource name for `demo/3`, or the name itself."""
    deployment, slash, number = text.partition("/")
    return revision(f"deployments/{deployment}", number if slash and "/" not in number else text)


def trace(text: str) -> str:
    """A trace's resource name for its id, or for a `traceparent`."""
    found = re.fullmatch(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", text.lower())
    return resource("traces", found.group(1) if found else text.lower() if "/" not in text else text)


def is_path(text: str) -> bool:
    """True where a word of the command line means a file or a folder rather than a tag: it has a `/` or ends in tar."""
    return text.startswith((".", "/", "~")) or "/" in text or text.endswith((".tar", ".tar.gz", ".tgz", ".bento"))


def exact(name: str) -> str:
    """A version's resource name that says which version it means.

    Raises:
        InvalidArgument: it says `latest`, which may be another one tomorrow (VERSION_REQUIRED).
    """
    if name.endswith("/latest"):
        parts = name.split("/")
        raise InvalidArgument(f"Say which version of {parts[1]!r}: {parts[1]}:VERSION.", reason="VERSION_REQUIRED")
    return name
