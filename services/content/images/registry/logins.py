"""Logins for registries from docker's and podman's files, and from the programs that these name.

Source: docker's config.json (`auths`, `credHelpers`, `credsStore`), containers-auth.json(5), docker-credential-helpers.
"""

import asyncio
import base64
import binascii
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition
from services.content.images.registry.names import DOCKER_HUB
from services.content.images.registry.options import RegistryOptions

_PROGRAM_S = 30.0
_NOT_THERE = "credentials not found in native keychain"
_DOCKER_HUB_KEYS = ("https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class Login:
    """Who to be at a registry."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """Exchanged for tokens at the registry's token service; in place of a password."""

    @property
    def basic(self) -> str:
        """The header of Basic authentication."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


async def find_login(host: str, repository: str, options: RegistryOptions) -> Login | None:
    """The login for a repository, from the first file that knows its host or a part of its name; None for anonymous.

    Raises:
        FailedPrecondition: a file or a program that is named cannot be used (REGISTRY_LOGIN_UNREADABLE).
    """
    for file in options.login_files:
        config = await asyncio.to_thread(_read, file)
        if config is not None and (login := await _of_file(config, file, host, repository)) is not None:
            return login
    return None


async def _of_file(config: Mapping[str, Any], file: Path, host: str, repository: str) -> Login | None:
    helpers, auths = config.get("credHelpers"), config.get("auths")
    keys = list(_keys(host, repository))
    if isinstance(helpers, dict):
        for key in keys:
            if isinstance(program := helpers.get(key), str) and program:
                return await _ask(program, key, file)
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        for key in _DOCKER_HUB_KEYS[:1] if host == DOCKER_HUB else (host, f"https://{host}"):
            if (login := await _ask(store, key, file)) is not None:
                return login
    if isinstance(auths, dict):
        for key in keys:
            if isinstance(entry := auths.get(key), dict) and (found := _of_entry(entry, file, key)) is not None:
                return found
    return None


def _keys(host: str, repository: str) -> Iterator[str]:
    """Under what a file may have it: the repository, each name above it, the host, the host as docker once wrote it."""
    parts = [host, *repository.split("/")]
    for length in range(len(parts), 1, -1):
        yield "/".join(parts[:length])
    yield from _DOCKER_HUB_KEYS if host == DOCKER_HUB else (host, f"https://{host}", f"https://{host}/")
    yield from () if host == DOCKER_HUB else (f"https://{host}/v1/", f"https://{host}/v2/", f"http://{host}")


def _of_entry(entry: Mapping[str, Any], file: Path, key: str) -> Login | None:
    if token := entry.get("identitytoken"):
        return Login(identity_token=str(token))
    if entry.get("username") and entry.get("password"):
        return Login(str(entry["username"]), str(entry["password"]))
    if not entry.get("auth"):
        return None  # docker leaves an empty entry where a program keeps the login
    try:
        user, colon, password = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        colon = ""
    if not colon:
        raise _unreadable(file, f"its entry for {key} is not base64 of USER:PASSWORD")
    return Login(user, password.rstrip("\0"))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as exc:
        raise _unreadable(file, str(exc)) from exc
    if not isinstance(config, dict):
        raise _unreadable(file, "it is not a JSON object")
    return config


async def _ask(name: str, key: str, file: Path) -> Login | None:
    """What `docker-credential-NAME get` says of a host."""
    program = shutil.which(f"docker-credential-{name}") if "/" not in name else None
    if program is None:
        raise _unreadable(file, f"it names the program docker-credential-{name}, which is not on PATH")
    process = await asyncio.create_subprocess_exec(
        program,
        "get",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_PROGRAM_S):
            answer, errors = await process.communicate(key.encode())
    except TimeoutError as exc:
        raise _unreadable(file, f"docker-credential-{name} did not answer within {_PROGRAM_S:.0f} s") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = (answer + errors).decode(errors="replace").strip()
    if process.returncode:
        if _NOT_THERE in said:
            return None
        raise _unreadable(file, f"docker-credential-{name} failed for {key}: {said[:200]}")
    try:
        found = json.loads(answer)
        user, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError) as exc:
        raise _unreadable(file, f"docker-credential-{name} answered {key} with something else than a login") from exc
    return Login(identity_token=secret) if user == "<token>" else Login(user, secret)


def _unreadable(file: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The logins in {file} cannot be used: {why}. Log in again (docker login, podman login), or mend the file.",
        reason="REGISTRY_LOGIN_UNREADABLE",
        file=str(file),
        why=why,
    )
