"""Kubeconfigs that somebody gives: cut down to what is needed, and nothing in them that runs or reads on this machine.

Source: kubernetes.io/docs/reference/config-api/kubeconfig.v1.
"""

import base64
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from ekiben.errors import InvalidArgument

MAX_BYTES = 256 << 10
_CLUSTER = ("server", "certificate-authority-data", "insecure-skip-tls-verify", "tls-server-name")
_USER = ("token", "client-certificate-data", "client-key-data")
_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
_PROGRAMS = ("exec", "auth-provider")
_TOKEN = re.compile(r"[!-~]+")
"""What fits into a header."""


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
        InvalidArgument: it is none, lacks the context, names files or programs, or has certificates, keys or a server
            that cannot be used whatever the cluster says (KUBECONFIG_REFUSED).
    """
    if len(text) > MAX_BYTES:
        raise _refused(f"it has {len(text)} characters; at most {MAX_BYTES} are taken")
    try:
        whole = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # Dates that are none; brackets without end.
        raise _refused(f"it is no YAML: {getattr(exc, 'problem', exc)}") from None
    if not isinstance(whole, Mapping):
        raise _refused("it is no kubeconfig: give the text that `kubectl config view --minify --flatten --raw` prints")
    chosen = context or str(whole.get("current-context") or "")
    if not chosen:
        raise _refused("it has no current-context: name the context")
    named = _named(whole, "contexts", chosen, "context")
    cluster = _named(whole, "clusters", str(named.get("cluster")), "cluster")
    user = _named(whole, "users", str(named.get("user")), "user")
    cluster, user = _without_spaces(cluster), _without_spaces(user)
    server = str(cluster.get("server") or "")
    if not _is_url(server):
        # Errors are logged and audited: what may be a password stays out.
        shown = f"…@{server.rpartition('@')[2]}" if "@" in server else server
        raise _refused(f"its server {shown!r} is no URL of the form https://HOST:PORT")
    _check({**cluster, **user})
    _check_tls(cluster, user)
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
    if fields.get("proxy-url"):
        raise _refused("its proxy-url is not followed: the deployer must reach the server itself")
    for key in (*_CLUSTER, *_USER):
        wanted, said = (bool, "true or false") if key == "insecure-skip-tls-verify" else (str, "a text")
        if key in fields and not isinstance(fields[key], wanted):
            raise _refused(f"its {key} must be {said}")
    if fields.get("token") and not _TOKEN.fullmatch(fields["token"]):
        raise _refused("its token has spaces, line breaks or letters that no token has")


def _check_tls(cluster: Mapping[str, Any], user: Mapping[str, Any]) -> None:
    """Read the certificates and the key as a connection would, which nobody could begin otherwise."""
    try:
        if authority := cluster.get("certificate-authority-data"):
            # As text it must hold one: no text at all would mean the machine's own.
            ssl.create_default_context(cadata=base64.b64decode(authority).decode() or "empty")
    except (ValueError, OSError) as exc:
        raise _refused(f"its certificate-authority-data holds no certificate in PEM, in base64: {exc}") from None
    if not user.get("client-certificate-data"):
        return
    try:
        chain = x509.load_pem_x509_certificates(base64.b64decode(user["client-certificate-data"]))
        key = serialization.load_pem_private_key(base64.b64decode(user["client-key-data"]), password=None)
        fit = chain[0].public_key() == key.public_key()
    except UnsupportedAlgorithm as exc:
        raise _refused(f"its client certificate or key is of a kind that cannot be used here: {exc}") from None
    except (ValueError, TypeError) as exc:
        raise _refused(f"its client certificate or key is no PEM, in base64 and without a password: {exc}") from None
    if not fit:
        raise _refused("its client-key-data is not the key of its client-certificate-data")


def _is_url(server: str) -> bool:
    try:
        parts = urlsplit(server)
        _ = parts.port
    except ValueError:
        return False
    inside = re.fullmatch(r"[!-~]+", server) and parts.scheme in ("https", "http") and parts.hostname
    return bool(inside) and parts.username is None and not parts.query and not parts.fragment


def _without_spaces(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As a block of YAML ends a text with a line break."""
    return {key: value.strip() if isinstance(value, str) else value for key, value in fields.items()}


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
