"""`ekiben … -o json` and `-o yaml` say what the HTTP/JSON API says, for every list and every get."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.platform import BentoMl, Platform

# The noun and its list as the command takes it, the collection's path, and the list's field.
LISTS = [
    (("models", "list"), "/v1/modelRepositories/-/models", "models"),
    (("bentos", "list"), "/v1/bentoRepositories/-/bentos", "bentos"),
    (("repositories", "list", "models"), "/v1/modelRepositories", "modelRepositories"),
    (("repositories", "list", "bentos"), "/v1/bentoRepositories", "bentoRepositories"),
    (("aliases", "list", "models"), "/v1/modelRepositories/-/aliases", "aliases"),
    (("aliases", "history", "models"), "/v1/modelRepositories/-/aliases/-/changes", "changes"),
    (("builds", "list"), "/v1/builds", "builds"),
    (("deployments", "list"), "/v1/deployments", "deployments"),
    (("deployments", "revisions", "compared"), "/v1/deployments/compared/revisions", "revisions"),
    (("deployments", "replicas", "compared"), "/v1/deployments/compared/replicas", "replicas"),
    (("clusters", "list"), "/v1/clusters", "clusters"),
    (("instance-types", "list"), "/v1/instanceTypes", "instanceTypes"),
    (
        ("predictions", "list", "--deployment", "compared"),
        "/v1/predictions?deployment=deployments/compared",
        "predictions",
    ),
    (("audit", "list"), "/v1/auditEntries", "auditEntries"),
    (("users", "list"), "/v1/users", "users"),
    (("tokens", "list"), "/v1/apiTokens", "apiTokens"),
    (("secrets", "list"), "/v1/secrets", "secrets"),
]
GETS = [
    (("models", "get"), "/v1/modelRepositories/-/models", "models"),
    (("bentos", "get"), "/v1/bentoRepositories/-/bentos", "bentos"),
    (("repositories", "get", "models"), "/v1/modelRepositories", "modelRepositories"),
    (("repositories", "get", "bentos"), "/v1/bentoRepositories", "bentoRepositories"),
    (("aliases", "get", "models"), "/v1/modelRepositories/-/aliases", "aliases"),
    (("builds", "get"), "/v1/builds", "builds"),
    (("deployments", "get"), "/v1/deployments", "deployments"),
    (("clusters", "get"), "/v1/clusters", "clusters"),
    (("predictions", "show"), "/v1/predictions?deployment=deployments/compared", "predictions"),
    (("users", "get"), "/v1/users", "users"),
    (("tokens", "get"), "/v1/apiTokens", "apiTokens"),
    (("secrets", "get"), "/v1/secrets", "secrets"),
]


@pytest.fixture(scope="module")
def populated(platform: Platform, bentoml: BentoMl, bentos: Path) -> Iterator[Platform]:
    """A platform with at least one of everything."""
    bentoml("deploy", str(bentos / "versions"), "--name", "compared", "--timeout", "240")
    model = bentoml.home / "m"
    model.mkdir()
    (model / "model.yaml").write_text("name: compared\nversion: v1\nmodule: none\napi_version: v1\n")
    platform.ekiben("models", "push", str(model))
    platform.ekiben("aliases", "set", "models", "compared:current", "v1")
    platform.ekiben("secrets", "create", "compared", "--literal", "A=b")
    url = platform.ekiben_json("deployments", "get", "compared")["urls"][0]
    from tests.platform import http, wait_for

    assert http("POST", f"{url}/version", b"{}", {"content-type": "application/json"}).status == 200
    wait_for("the prediction", lambda: platform.ekiben_json("predictions", "list", "--deployment", "compared"))
    yield platform
    platform.ekiben("deployments", "delete", "compared", "--yes")


def over_http(platform: Platform, path: str, field: str, size: int = 2) -> list[Any]:
    """Every item of a list, in pages of `size`."""
    items: list[Any] = []
    token = ""
    while True:
        if field in ("clusters", "instanceTypes", "replicas"):  # never many, so without pages
            whole: list[Any] = platform.api("GET", path).json().get(field, [])
            return whole
        joint = "&" if "?" in path else "?"
        answer = platform.api("GET", f"{path}{joint}pageSize={size}" + (f"&pageToken={token}" if token else ""))
        assert answer.status == 200, answer.body
        page = answer.json()
        assert len(page.get(field, [])) <= size
        items += page.get(field, [])
        token = page.get("nextPageToken", "")
        if not token:
            return items


@pytest.mark.parametrize(("command", "path", "field"), LISTS, ids=lambda it: " ".join(it) if type(it) is tuple else "")
def test_a_list_is_one_array_of_what_http_says(
    populated: Platform, command: tuple[str, ...], path: str, field: str
) -> None:
    said = over_http(populated, path, field, 1000 if field == "auditEntries" else 2)
    assert said
    assert populated.ekiben_json(*command) == said
    assert yaml.safe_load(populated.ekiben(*command, "-o", "yaml").stdout) == said
    first = populated.ekiben_json(*command, "--limit", "1") if "list" in command else said[:1]
    assert first == said[:1]


@pytest.mark.parametrize(("command", "path", "field"), GETS, ids=lambda it: " ".join(it) if type(it) is tuple else "")
def test_a_get_is_what_http_says(populated: Platform, command: tuple[str, ...], path: str, field: str) -> None:
    name = over_http(populated, path, field)[0]["name"]
    said = populated.api("GET", f"/v1/{name}").json()
    assert populated.ekiben_json(*command, name) == said
    assert yaml.safe_load(populated.ekiben(*command, name, "-o", "yaml").stdout) == said
    assert populated.ekiben(*command, name, "-o", "name").stdout.strip() == name
    if command[0] in ("builds", "deployments", "clusters", "users", "tokens", "secrets"):
        assert populated.ekiben_json(*command, name.rpartition("/")[2]) == said
        singular = command[0].removesuffix("s")
        assert populated.ekiben_json(singular, *command[1:], name) == said


def test_a_trace_is_what_http_says(populated: Platform) -> None:
    trace = populated.ekiben_json("predictions", "list", "--deployment", "compared")[0]["traceId"]
    said = populated.api("GET", f"/v1/traces/{trace}").json()
    assert populated.ekiben_json("traces", "show", trace) == said
    assert json.dumps(said).count('"spanId"') >= 2


def test_piped_tables_are_plain_and_whole(populated: Platform) -> None:
    for command, _, _ in LISTS:
        table = populated.ekiben(*command).stdout
        assert "\x1b" not in table
        assert "…" not in table
        heading, *rows = table.splitlines()
        assert heading == heading.upper()
        assert rows
