"""Names of images in registries are read as docker and skopeo read them."""

import pytest

from ekiben.errors import InvalidArgument
from services.content.images.registry.names import parse

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("name", "host", "repository", "reference"),
    [
        ("registry.example.com/team/app:1.0", "registry.example.com", "team/app", "1.0"),
        ("registry.example.com/app", "registry.example.com", "app", ""),
        ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000", "a/b/c", "v1"),
        ("localhost/app", "localhost", "app", ""),
        ("[::1]:5000/app:v1", "[::1]:5000", "app", "v1"),
        ("[::1]/app", "[::1]", "app", ""),
        ("[::99999]/app", "[::99999]", "app", ""),
        ("python:3.11-slim", "docker.io", "library/python", "3.11-slim"),
        ("team/app", "docker.io", "team/app", ""),
        ("docker.io/python", "docker.io", "library/python", ""),
        ("index.docker.io/team/app:1", "docker.io", "team/app", "1"),
        (f"registry.example.com/app@{DIGEST}", "registry.example.com", "app", DIGEST),
        (f"registry.example.com/app:1.0@{DIGEST}", "registry.example.com", "app", DIGEST),
        ("r.example.com/a__b/c-d.e_f--g", "r.example.com", "a__b/c-d.e_f--g", ""),
    ],
)
def test_names(name: str, host: str, repository: str, reference: str) -> None:
    found = parse(name)
    assert (found.host, found.repository, found.reference) == (host, repository, reference)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "no repository"),
        ("registry.example.com/", "no repository"),
        ("registry.example.com/Team/app", "'Team/app' is no repository"),
        ("registry.example.com/../app", "no repository"),
        ("registry.example.com/app:", "'' is no tag"),
        ("registry.example.com/app:a/b", "no tag|no repository"),
        ("registry.example.com/app@sha256:12", "'sha256:12' is no digest"),
        ("registry.example.com/app@", "no digest after"),
        ("user:secret@registry.example.com/app", "no host"),
        ("registry.example.com:http/app", "no host"),
        ("registry.example.com:99999/app", "'registry.example.com:99999' is no host"),
        ("[::1]:65536/app", "no host"),
    ],
)
def test_what_is_no_name_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        parse(name)
    assert caught.value.reason == "IMAGE_NAME_INVALID"
