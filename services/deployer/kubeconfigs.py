"""Kubeconfigs that somebody gives: cut down to what is needed, and nothing in them that runs or reads on this machine.

Source: kubernetes.io/docs/reference/config-api/kubeconfig.v1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from ekiben.errors import InvalidArgument

MAX_BYTES = 256 << 10
_CLUSTER = ("server", "certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name", "proxy-url")
_USER = ("token", "client-certificate-data", "client-key-data")
_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
_PROGRAMS = ("exec", "auth-provider")


@dataclass(frozen=True)
class Kubeconfig:
    """What is kept."""

    server: str
    text: str
    """One cluster, one user, one context. Holds credentials."""

    def __repr__(self) -> str:
        return f"Kubeconfig({self.server!r})"


def read(text: str, context: str) -> Kubeconfig:
    """The one context of a kubeconfig.

    Raises:
        InvalidArgument: it is none, lacks the context, or names files or programs (KUBECONFIG_REFUSED).
    """
    if len(text) > MAX_BYTES:
        raise _refused(f"it has {len(text)} characters; at most {MAX_BYTES} are taken")
    try:
        whole = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise _refused(f"it is no YAML: {getattr(exc, 'problem', exc)}") from None
    if not isinstance(whole, Mapping):
        raise _refused("it is no kubeconfig: give the text that `kubectl config view --minify --flatten --raw` prints")
    chosen = context or str(whole.get("current-context") or "")
    if not chosen:
        raise _refused("it has no current-context: name the context")
    named = _named(whole, "contexts", chosen, "context")
    cluster = _named(whole, "clusters", str(named.get("cluster")), "cluster")
    user = _named(whole, "users", str(named.get("user")), "user")
    server = str(cluster.get("server") or "")
    if urlsplit(server).scheme not in ("https", "http") or not urlsplit(server).hostname:
        raise _refused(f"its server {server!r} is no URL")
    _check({**cluster, **user})
    kept = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "ekiben",
        "contexts": [{"name": "ekiben", "context": {"cluster": "ekiben", "user": "ekiben"}}],
        "clusters": [{"name": "ekiben", "cluster": {key: cluster[key] for key in _CLUSTER if key in cluster}}],
        "users": [{"name": "ekiben", "user": {key: user[key] for key in _USER if key in user}}],
    }
    return Kubeconfig(server, yaml.safe_dump(kept))


def _check(fields: Mapping[str, Any]) -> None:
    if programs := [key for key in _PROGRAMS if key in fields]:
        raise _refused(
            f"its {programs[0]} would run a program where the deployer is: give the token of a ServiceAccount instead "
            "(`kubectl create token NAME --duration=8760h`)"
        )
    if files := [key for key in _FILES if key in fields]:
        raise _refused(
            f"its {files[0]} names a file, which the deployer does not have: put the content in, as `kubectl config "
            "view --minify --flatten --raw` does"
        )
    if not fields.get("token") and not (fields.get("client-certificate-data") and fields.get("client-key-data")):
        raise _refused("it has neither a token nor a client certificate with its key")


def _named(whole: Mapping[str, Any], kind: str, name: str, inside: str) -> Mapping[str, Any]:
    entries = whole.get(kind)
    for each in entries if isinstance(entries, list) else ():
        if isinstance(each, Mapping) and each.get("name") == name and isinstance(each.get(inside), Mapping):
            found: Mapping[str, Any] = each[inside]
            return found
    raise _refused(f"it has no {inside} {name!r}")


def _refused(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"The kubeconfig cannot be used: {why}.", reason="KUBECONFIG_REFUSED", violations=[("cluster.kubeconfig", why)]
    )
