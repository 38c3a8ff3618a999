"""What nodes log in with where they pull the platform's own images: one Secret of the namespace, made and renewed here.

It holds a token for each organization whose images are pulled. That can do nothing but pull and ends by itself, so none
must be taken back. A token is renewed in place when half of its time has gone: nodes read the Secret at each pull, pods
are not touched. While nothing is due, no call is made. A crash between a token and its Secret costs another token.

Source: kubernetes.io/docs/concepts/containers/images, "Config.json interpretation": the longest path that fits.
"""

import base64
import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from ekiben.errors import EkibenError
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.caches import Cache
from services.deployer.runtimes.kubernetes.names import APPLIED, INSTALLATION, PREFIX, Object, Where
from services.kernel.clock import Clock

PURPOSE = f"{PREFIX}/purpose"
ENDS = f"{PREFIX}/ends"
"""Annotation: when each organization's token ends, by organization."""
USER = "nodes"
_PAUSES_S = (1.0, 5.0, 15.0, 60.0)
"""Before it is tried again to get or to keep a token."""


@dataclass(frozen=True)
class Login:
    """With what an organization's images are pulled."""

    token: str
    ends: datetime


@dataclass(frozen=True)
class Logins:
    """Where logins come from."""

    issue: Callable[[str, timedelta], Awaitable[Login]]
    """Gives one for an organization's id, for so long."""
    lifetime: timedelta = timedelta(hours=24)


class PullSecret:
    """See the module. `host` is what nodes call the platform's `/v2/`, `secrets` all that are the installation's."""

    def __init__(self, api: Api, where: Where, host: str, logins: Logins, secrets: Cache, clock: Clock) -> None:
        self._api, self._where, self._host, self._clock = api, where, host, clock
        self._issue, self._lifetime = logins.issue, logins.lifetime
        self.name = f"ekiben-images-{where.installation[:8]}"
        self._secrets = secrets
        self.fault = ""
        """Why a token is not there or not renewed, in words."""
        self._failures, self._again_at = 0, 0.0
        self._trusted: set[str] = set()
        """Organizations whose token this process asked for: an older one may be sealed with a key that is no more."""

    def lend(self, spec: SetSpec) -> SetSpec:
        """The spec with this login, where its image is in the platform's own registry, and its own organization's: a
        prebuilt one may be named that is another's, and no one's login is lent for that."""
        host, _, path = spec.image.partition("/")
        if host != self._host or not spec.organization or path.partition("/")[0] != spec.organization:
            return spec
        return replace(spec, pull_secrets=(*spec.pull_secrets, self.name))

    def lent(self, spec: SetSpec) -> bool:
        """Whether the pods of a set pull with this login."""
        return self.name in spec.pull_secrets

    async def look(self, organizations: set[str]) -> None:
        """Have a token in the Secret for each of them. What keeps it from that is `fault`, and is tried again."""
        if self._again_at > self._clock.monotonic():
            return
        try:
            await self._ensure(organizations)
            self.fault, self._failures, self._again_at = "", 0, 0.0
        except EkibenError as exc:
            self.fault = f"Nodes cannot be given a login for the platform's images: {exc.message}"
            self._again_at = self._clock.monotonic() + _PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)]
            self._failures += 1

    def serves(self, organization: str) -> bool:
        """Whether nodes can log in for an organization's images now."""
        return self._left(organization) > timedelta()

    async def _ensure(self, organizations: set[str]) -> None:
        wanted = {one for one in organizations if one not in self._trusted or self._left(one) < self._lifetime / 2}
        live = self._live()
        if not wanted and (not organizations or _digest((live or {}).get("data") or {}) == self._digest()):
            return
        auths, ends = self._kept() if live else ({}, {})
        for one in sorted(wanted | (organizations - ends.keys())):
            login = await self._issue(one, self._lifetime)
            auths[f"{self._host}/{one}"] = auth_of(login.token)
            ends[one] = login.ends.isoformat()
        applied = await self._api.apply(self._secret(auths, ends))
        self._secrets.put(applied)
        self._trusted |= organizations

    async def remove(self) -> None:
        """Take the Secret away, if it is there: nobody pulls with it any more."""
        if self._live() is not None:
            await self._api.delete("Secret", self.name)
            self._secrets.objects.pop(self.name, None)
            self._trusted.clear()

    def forget(self) -> None:
        """Leave the Secret to another process, and trust none of what it puts there later."""
        self._trusted.clear()

    def due_s(self) -> float | None:
        """In how many seconds there is something to do; None while there is not."""
        if self._again_at:
            return self._again_at - self._clock.monotonic()
        return min(((self._left(one) - self._lifetime / 2).total_seconds() for one in self._trusted), default=None)

    def _left(self, organization: str) -> timedelta:
        ends = self._ends().get(organization)
        return datetime.fromisoformat(ends) - self._clock.now() if ends else timedelta()

    def _live(self) -> Object | None:
        return self._secrets.objects.get(self.name)

    def _annotations(self) -> dict[str, str]:
        live = self._live()
        return dict(live["metadata"].get("annotations") or {}) if live else {}

    def _ends(self) -> dict[str, str]:
        return dict(json.loads(self._annotations().get(ENDS) or "{}"))

    def _digest(self) -> str:
        return self._annotations().get(APPLIED, "")

    def _kept(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """What of the live Secret still works: the logins of other organizations."""
        try:
            data = ((self._live() or {}).get("data") or {})[".dockerconfigjson"]
            auths, now = json.loads(base64.b64decode(data))["auths"], self._clock.now()
            ends = {one: end for one, end in self._ends().items() if datetime.fromisoformat(end) > now}
            return {f"{self._host}/{one}": auths[f"{self._host}/{one}"] for one in ends}, ends
        except (KeyError, ValueError, TypeError):
            return {}, {}  # somebody else wrote into it

    def _secret(self, auths: dict[str, dict[str, str]], ends: dict[str, str]) -> Object:
        content = json.dumps({"auths": auths}, sort_keys=True).encode()
        data = {".dockerconfigjson": base64.b64encode(content).decode()}
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": self.name,
                "namespace": self._where.namespace,
                "labels": {
                    "app.kubernetes.io/managed-by": "ekiben",
                    INSTALLATION: self._where.installation,
                    PURPOSE: "images",
                },
                "annotations": {ENDS: json.dumps(ends, sort_keys=True), APPLIED: _digest(data)},
            },
            "type": "kubernetes.io/dockerconfigjson",
            "data": data,
        }


def auth_of(token: str) -> dict[str, str]:
    """The token as an entry of `.dockerconfigjson`."""
    return {
        "username": USER,
        "password": token,
        "auth": base64.b64encode(f"{USER}:{token}".encode()).decode(),
    }


def _digest(data: Object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
