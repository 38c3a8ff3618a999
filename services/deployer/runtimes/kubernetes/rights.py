"""Which rights the runtime needs in a namespace, and which of them credentials lack. Pure.

A Role in each namespace is enough: nothing of the cluster itself is read or written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_LOOK = ("get", "list", "watch")
_KEEP = ("get", "list", "watch", "create", "patch", "delete")


@dataclass(frozen=True)
class Right:
    """What is allowed on one kind of thing."""

    group: str
    resource: str
    verbs: tuple[str, ...]
    optional: str = ""
    """What is not there without it; empty where nothing works without it."""


RIGHTS = (
    Right("", "serviceaccounts", _KEEP),
    Right("", "secrets", _KEEP),
    Right("", "services", _KEEP),
    Right("", "pods", _LOOK),
    Right("", "pods/log", ("get",)),
    Right("apps", "deployments", _KEEP),
    Right("policy", "poddisruptionbudgets", _KEEP),
    Right("networking.k8s.io", "networkpolicies", _KEEP),
    Right("autoscaling", "horizontalpodautoscalers", _KEEP),
    Right("discovery.k8s.io", "endpointslices", _LOOK),
    Right("", "events", _LOOK, "events and words for what is wrong with pods"),
    Right("", "configmaps", ("get",), "ConfigMaps in pod settings"),
    Right("", "persistentvolumeclaims", ("get",), "volume claims in pod settings"),
    Right("", "pods", ("create",), "trial of pods (a dry run) before a deployment is accepted"),
    Right("", "pods/exec", ("get", "create"), "terminals"),
    Right("", "pods/attach", ("get", "create"), "debug containers"),
    Right("", "pods/ephemeralcontainers", ("patch",), "debug containers"),
    Right("networking.k8s.io", "ingresses", _KEEP, "exposure by Ingress"),
    Right("gateway.networking.k8s.io", "httproutes", _KEEP, "exposure by HTTPRoute"),
)


def missing(rules: Sequence[Mapping[str, Any]], namespace: str) -> list[str]:
    """What is not allowed by these rules of a SelfSubjectRulesReview, in words."""
    found = []
    for right in RIGHTS:
        verbs = [verb for verb in right.verbs if not any(_allows(rule, right, verb) for rule in rules)]
        if verbs:
            name = f"{right.resource}.{right.group}" if right.group else right.resource
            without = f" (without it there are no {right.optional})" if right.optional else ""
            found.append(f"{', '.join(verbs)} {name} in {namespace}{without}")
    return found


def roles(namespaces: Sequence[str], account: str) -> str:
    """YAML of a Role and its RoleBinding in each namespace; `account` is `NAMESPACE/NAME` of a ServiceAccount."""
    home, _, name = account.partition("/")
    rules = [{"apiGroups": [one.group], "resources": [one.resource], "verbs": list(one.verbs)} for one in RIGHTS]
    made: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": home}}
    ]
    for namespace in namespaces:
        head = {"name": "ekiben-deployer", "namespace": namespace}
        made.append({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": head, "rules": rules})
        made.append(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": head,
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "ekiben-deployer"},
                "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": home}],
            }
        )
    # A text of its own each: the rules are one list, which YAML would write as a reference.
    return "---\n".join(yaml.safe_dump(_copied(one), sort_keys=False) for one in made)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def _allows(rule: Mapping[str, Any], right: Right, verb: str) -> bool:
    def has(key: str, wanted: str) -> bool:
        listed = rule.get(key) or ()
        return "*" in listed or wanted in listed

    return (
        not rule.get("resourceNames")
        and has("verbs", verb)
        and has("apiGroups", right.group)
        and (
            has("resources", right.resource) or f"*/{right.resource.partition('/')[2]}" in (rule.get("resources") or ())
        )
    )
