"""Which rights credentials lack, and the roles that give them."""

import yaml

from services.deployer.runtimes.kubernetes.rights import RIGHTS, missing, roles


def test_the_roles_give_all_that_is_needed_and_nothing_of_the_cluster() -> None:
    made = list(yaml.safe_load_all(roles(["one", "two"], "one/ekiben")))
    assert [(each["kind"], each["metadata"]["namespace"]) for each in made] == [
        ("ServiceAccount", "one"),
        ("Role", "one"),
        ("RoleBinding", "one"),
        ("Role", "two"),
        ("RoleBinding", "two"),
    ]
    assert missing(made[1]["rules"], "one") == []


def test_what_is_not_allowed_is_said_with_what_is_not_there_then() -> None:
    rules = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list", "watch", "create", "delete"]}]
    found = missing(rules, "one")
    assert "patch deployments.apps in one" in found
    assert "patch pods/ephemeralcontainers in one (without it there are no debug containers)" in found
    assert len(missing([], "one")) == len(RIGHTS)
    named = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"], "resourceNames": ["only-this"]}]
    assert len(missing(named, "one")) == len(RIGHTS), "a right on one object is no right on all"
