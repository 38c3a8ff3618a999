"""Logins are found where docker and podman keep them, and nowhere else."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition
from services.content.images.registry.logins import Login, find_login
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.tokens import _best

HOST = "registry.example.com:5000"


def basic(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def files(folder: Path, *contents: Any) -> RegistryOptions:
    paths = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        paths.append(path)
    return RegistryOptions(login_files=(folder / "absent.json", *paths))


@pytest.mark.parametrize(
    ("auths", "expected"),
    [
        ({HOST: basic("me:pass:word")}, Login("me", "pass:word")),
        ({f"https://{HOST}/v1/": basic("me:x")}, Login("me", "x")),
        ({HOST: {"username": "me", "password": "x"}}, Login("me", "x")),
        ({HOST: {"auth": "", "identitytoken": "token"}}, Login(identity_token="token")),
        ({f"{HOST}/team": basic("team:x"), HOST: basic("all:x")}, Login("team", "x")),
        ({f"{HOST}/team/app": basic("app:x"), f"{HOST}/team": basic("team:x")}, Login("app", "x")),
        ({f"{HOST}/tea": basic("other:x")}, None),
        ({"registry.example.com": basic("other port:x")}, None),
        ({HOST: {}}, None),
        ({}, None),
    ],
)
async def test_the_nearest_entry_counts(tmp_path: Path, auths: dict[str, Any], expected: Login | None) -> None:
    assert await find_login(HOST, "team/app", files(tmp_path, {"auths": auths})) == expected


async def test_the_first_file_that_knows_the_host_counts(tmp_path: Path) -> None:
    other, mine, late = (
        {"auths": {"other": basic("a:b")}},
        {"auths": {HOST: basic("mine:x")}},
        {"auths": {HOST: basic("late:x")}},
    )
    assert await find_login(HOST, "app", files(tmp_path, other, mine, late)) == Login("mine", "x")
    hub = files(tmp_path, {"auths": {"https://index.docker.io/v1/": basic("hub:x")}})
    assert await find_login("docker.io", "library/python", hub) == Login("hub", "x")


async def test_programs_are_asked_as_docker_asks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "docker-credential-ektest"
    program.write_text(
        "#!/bin/sh\nread host\n"
        'case "$1 $host" in\n'
        f'"get {HOST}") echo \'{{"ServerURL": "x", "Username": "helped", "Secret": "word"}}\' ;;\n'
        '"get token.example.com") echo \'{"Username": "<token>", "Secret": "refresh"}\' ;;\n'
        '"get broken.example.com") echo "the keychain is locked"; exit 1 ;;\n'
        '"get odd.example.com") echo "not JSON" ;;\n'
        "*) echo 'credentials not found in native keychain'; exit 1 ;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    stored = files(tmp_path, {"credsStore": "ektest", "auths": {HOST: {}, "plain.example.com": basic("plain:x")}})
    assert await find_login(HOST, "app", stored) == Login("helped", "word")
    assert await find_login("token.example.com", "app", stored) == Login(identity_token="refresh")
    assert await find_login("plain.example.com", "app", stored) == Login("plain", "x")
    assert await find_login("unknown.example.com", "app", stored) is None
    for host, why in (("broken.example.com", "keychain is locked"), ("odd.example.com", "something else")):
        with pytest.raises(FailedPrecondition, match=why):
            await find_login(host, "app", stored)
    helpers = files(tmp_path, {"credHelpers": {HOST: "ektest"}, "auths": {HOST: basic("not:this")}})
    assert await find_login(HOST, "app", helpers) == Login("helped", "word")
    absent = files(tmp_path, {"credHelpers": {HOST: "nobody-has-it"}})
    with pytest.raises(FailedPrecondition, match="docker-credential-nobody-has-it, which is not on PATH"):
        await find_login(HOST, "app", absent)
    elsewhere = files(tmp_path, {"credHelpers": {HOST: "../../bin/sh"}})
    with pytest.raises(FailedPrecondition, match="not on PATH"):
        await find_login(HOST, "app", elsewhere)


@pytest.mark.parametrize(
    "content", ["{", "[]", {"auths": {HOST: {"auth": "???"}}}, {"auths": {HOST: {"auth": "bm9jb2xvbg=="}}}]
)
async def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(FailedPrecondition, match=r"0\.json cannot be used") as caught:
        await find_login(HOST, "app", files(tmp_path, content))
    assert caught.value.reason == "REGISTRY_LOGIN_UNREADABLE"


def test_a_password_is_in_no_text() -> None:
    assert "secret" not in repr(Login("me", "secret", "secret"))


def test_where_files_are_looked_for() -> None:
    found = RegistryOptions.from_environment({"HOME": "/home/me", "XDG_RUNTIME_DIR": "/run/me"})
    assert [str(each) for each in found.login_files] == [
        "/run/me/containers/auth.json",
        "/home/me/.config/containers/auth.json",
        "/home/me/.docker/config.json",
    ]
    given = {
        "HOME": "/home/me",
        "DOCKER_CONFIG": "/etc/d",
        "EKIBEN_REGISTRY_INSECURE": "a:1, b",
        "EKIBEN_REGISTRY_CERTIFICATES": "/c",
    }
    found = RegistryOptions.from_environment(given)
    assert str(found.login_files[0]) == "/etc/d/config.json"
    assert (found.insecure, str(found.certificates[0])) == ({"a:1", "b"}, "/c")
    found = RegistryOptions.from_environment(
        {"HOME": "/home/me", "REGISTRY_AUTH_FILE": "/only", "DOCKER_CONFIG": "/etc/d"}
    )
    assert [str(each) for each in found.login_files] == ["/only"]


@pytest.mark.parametrize(
    ("headers", "scheme", "parameters"),
    [
        (['Basic realm="x"'], "basic", {"realm": "x"}),
        (
            ['Bearer realm="https://a/t",service="s, t",scope="repository:a/b:pull,push"'],
            "bearer",
            {"realm": "https://a/t", "service": "s, t", "scope": "repository:a/b:pull,push"},
        ),
        (
            ['Basic realm="x", Bearer realm="https://a/t", service=s'],
            "bearer",
            {"realm": "https://a/t", "service": "s"},
        ),
        (['Basic realm="x"', 'BEARER Realm="https://a/t"'], "bearer", {"realm": "https://a/t"}),
        (['Bearer realm="with \\"quotes\\""'], "bearer", {"realm": 'with "quotes"'}),
    ],
)
def test_challenges_are_read(headers: list[str], scheme: str, parameters: dict[str, str]) -> None:
    found = _best(headers)
    assert found is not None and (found.scheme, dict(found.parameters)) == (scheme, parameters)


def test_a_challenge_that_is_not_known_is_none() -> None:
    assert _best(["Negotiate"]) is None and _best([]) is None and _best(['Digest realm="x"']) is None
