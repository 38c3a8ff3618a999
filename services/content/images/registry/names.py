"""The names of images in registries: `HOST/REPOSITORY[:TAG|@DIGEST]`, as docker, podman and skopeo read them."""

import re
from dataclasses import dataclass

from ekiben.errors import InvalidArgument

DOCKER_HUB = "docker.io"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(r"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_PORT = re.compile(r"(?::([0-9]+))?$")
_LAST_PORT = 65535
_LONGEST_HOST = 253 + len(":65535")


@dataclass(frozen=True)
class Location:
    """Where an image is, or shall be."""

    host: str
    """As people write it: `docker.io`, `registry.example.com:5000`."""
    repository: str
    reference: str = ""
    """A tag or a digest; empty for none."""

    @property
    def api_host(self) -> str:
        """Who answers for the host."""
        return "registry-1.docker.io" if self.host == DOCKER_HUB else self.host

    def __str__(self) -> str:
        return f"docker://{self.host}/{self.repository}"


def parse(name: str) -> Location:
    """Read what follows `docker://`. A first word without a dot, a port or `localhost` is a name on Docker Hub.

    Where there are a tag and a digest, the digest counts.

    Raises:
        InvalidArgument: it is not of that form (IMAGE_NAME_INVALID); the message says what is wrong.
    """
    host, slash, rest = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, rest = DOCKER_HUB, name
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = DOCKER_HUB
    rest, _, digest = rest.partition("@")
    repository, colon, tag = rest.partition(":")
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    wrong = ""
    if not is_host(host):
        wrong = f"{host!r} is no host"
    elif _REPOSITORY.fullmatch(repository) is None or len(repository) > 255:
        wrong = f"{repository!r} is no repository (lower-case letters, digits and single . _ - between them)"
    elif colon and _TAG.fullmatch(tag) is None:
        wrong = f"{tag!r} is no tag (letters, digits, . _ -, at most 128)"
    elif digest and _DIGEST.fullmatch(digest) is None:
        wrong = f"{digest!r} is no digest (sha256: and 64 hex digits)"
    elif "@" in name and not digest:
        wrong = "there is no digest after the @"
    if wrong:
        raise InvalidArgument(
            f"The image 'docker://{name}' is refused: {wrong}. Its form is docker://HOST/REPOSITORY[:TAG|@DIGEST].",
            reason="IMAGE_NAME_INVALID",
            image=f"docker://{name}",
        )
    return Location(host, repository, digest or tag)


def is_host(text: str) -> bool:
    """Whether it is `HOST[:PORT]`, where a host may be an IPv6 address in brackets."""
    if len(text) > _LONGEST_HOST or _HOST.fullmatch(text) is None:
        return False
    return int(_PORT.findall(text)[0] or 0) <= _LAST_PORT
