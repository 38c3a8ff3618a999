"""Use cases over terminals: asked for, run and recorded, read afterwards.

A terminal is a row before anything runs, so that who asked for what is known whatever happens then. While it is open,
its recording is written every second; where it cannot be written, or is full, the terminal is closed. A deployer that
starts says of those that its former run had open that they are lost; what ran in them was hung up with it.
"""

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from ekiben import names
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import (
    EkibenError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from services.deployer import prebuilt
from services.deployer.attachments import Attachment, Input, Output
from services.deployer.deployments import Deployments
from services.deployer.domain import MAIN, Terminal
from services.deployer.gate import Gate
from services.deployer.reconciler import Reconciler
from services.deployer.runtimes import Phase, Runtime, SetStatus
from services.deployer.settings import Settings
from services.deployer.store import TerminalStore
from services.kernel.clock import Clock
from services.kernel.identity import Principal

log = logging.getLogger(__name__)

ATTACH_WITHIN = timedelta(minutes=1)
LONGEST_COMMAND = 64 << 10
LONGEST_INPUT = 64 << 10
SWEEP_S = 600.0


class Terminals:
    """See the module."""

    def __init__(
        self,
        store: TerminalStore,
        deployments: Deployments,
        reconciler: Reconciler,
        runtime: Runtime,
        settings: Settings,
        owner: str,
        clock: Clock,
        gate: Gate | None = None,
    ) -> None:
        self._store, self._deployments, self._reconciler, self._runtime = store, deployments, reconciler, runtime
        self._settings, self._owner, self._clock, self._gate = settings, owner, clock, gate

    async def create(
        self,
        caller: Principal,
        parent: str,
        *,
        replica: str,
        service: str,
        command: Sequence[str],
        tty: bool,
        image: str,
    ) -> Terminal:
        """Write one down, to be attached to.

        Raises:
            PermissionDenied: terminals are for administrators (ROLE_TOO_LOW).
            FailedPrecondition: they are off (TERMINALS_OFF), no replica runs (REPLICA_NOT_RUNNING), or only signed
                images may run, and this one may not (reasons as `Gate.look`).
            NotFound: no such replica (REPLICA_NOT_FOUND).
            EkibenError: only signed images may run, and this one's registry cannot be asked, or does not have it.
        """
        self._allowed(caller)
        image = await self._trusted(image)
        if sum(len(word.encode()) + 1 for word in command) > LONGEST_COMMAND or any("\0" in word for word in command):
            raise InvalidArgument(
                "The command must have at most 64 KiB, and no zero bytes.",
                reason="FIELDS_INVALID",
                violations=[("terminal.command", "is too long, or holds a zero byte")],
            )
        deployment, revision = await self._deployments.get(caller.organization, parent)
        entry = revision.bentos[MAIN].parsed().entry
        chosen = _chosen(self._reconciler.observed(deployment.uid), replica, service, entry)
        terminal = Terminal(
            id=f"t{secrets.token_hex(8)}",
            organization=caller.organization,
            deployment=deployment.name,
            deployment_uid=deployment.uid,
            replica=chosen[0],
            service=chosen[1],
            command=tuple(command),
            tty=tty,
            debug_image=image,
            user=caller.user,
            state="PENDING",
            create_time=self._clock.now(),
        )
        await self._store.add(terminal)
        return terminal

    async def get(self, caller: Principal, name: str) -> Terminal:
        """One. A developer's own, or an administrator's any.

        Raises:
            NotFound: there is none, or it is somebody else's (TERMINAL_NOT_FOUND).
        """
        parsed = names.Terminal.parse(name)
        found = await self._store.get(caller.organization, parsed.deployment, parsed.terminal)
        if found is None or (caller.role < Role.ROLE_ADMIN and found.user != caller.user):
            raise NotFound(
                f"{name} does not exist, or is somebody else's; `ekiben deployments recordings list` shows yours.",
                reason="TERMINAL_NOT_FOUND",
                terminal=name,
            )
        return found

    async def list_(
        self, caller: Principal, parent: str, after: tuple[datetime, str] | None, limit: int
    ) -> list[Terminal]:
        """Newest first; a developer's own, or for an administrator all."""
        deployment = names.Deployment.parse(parent).deployment
        user = "" if caller.role >= Role.ROLE_ADMIN else caller.user
        return await self._store.list_(caller.organization, deployment, user, after, limit)

    async def read(self, caller: Principal, name: str) -> AsyncIterator[str]:
        """The recording, as far as it has come."""
        terminal = await self.get(caller, name)
        async for text in self._store.read(terminal.id):
            yield text

    async def delete(self, caller: Principal, name: str) -> None:
        """Remove one with its recording.

        Raises:
            FailedPrecondition: it is open (TERMINAL_OPEN).
        """
        terminal = await self.get(caller, name)
        if terminal.state == "OPEN":
            raise FailedPrecondition(f"{name} is open; delete it once it has ended.", reason="TERMINAL_OPEN")
        await self._store.remove(terminal.id)

    async def attach(
        self, caller: Principal, name: str, size: tuple[int, int], inputs: AsyncIterator[Input]
    ) -> AsyncIterator[Output]:
        """Run the command: its outputs, `Exit` last. Left before that, it is hung up.

        Raises:
            FailedPrecondition: it is open or has ended (TERMINAL_TAKEN), its replica does not run any more, or what
                `create` says.
        """
        self._allowed(caller)
        terminal = await self.get(caller, name)
        if terminal.user != caller.user:
            raise PermissionDenied(f"{name} is somebody else's.", reason="TERMINAL_FOREIGN")
        # It may be from before a start with another policy, or with other keys.
        terminal = replace(terminal, debug_image=await self._trusted(terminal.debug_image))
        late = self._clock.now() > terminal.create_time + ATTACH_WITHIN
        self._reconciler.ownership.check()
        if late or not await self._store.open(terminal.id, self._owner):
            raise FailedPrecondition(
                f"{name} was opened before, or was not opened within a minute; make another one.",
                reason="TERMINAL_TAKEN",
                terminal=name,
            )
        attachment = Attachment(terminal, self._store, self._runtime, self._settings, self._clock)
        async with contextlib.aclosing(attachment.outputs(size, inputs)) as outputs:
            async for output in outputs:
                yield output

    async def run(self) -> None:
        """End what a former run of this deployer left open, and remove what is old; for ever."""
        first = True
        while True:
            try:
                await self.sweep(own=first)
                first = False
            except EkibenError as exc:
                log.warning("terminals could not be swept", extra={"reason": exc.reason})
            await self._clock.sleep(SWEEP_S)

    async def sweep(self, *, own: bool = False) -> None:
        """End what is lost, `own`: of this deployer's former run too; and remove what is old."""
        now = self._clock.now()
        longest = timedelta(seconds=self._settings.terminal_limit_s) + 5 * ATTACH_WITHIN
        await self._store.end_lost(self._owner if own else "-", now - longest, now)
        if self._settings.terminal_keep_days:
            await self._store.remove_old(now - timedelta(days=self._settings.terminal_keep_days))

    def _allowed(self, caller: Principal) -> None:
        if self._settings.terminals == "off":
            raise FailedPrecondition(
                "Nobody may open terminals here; EKIBEN_DEPLOYER_TERMINALS says so.", reason="TERMINALS_OFF"
            )
        if self._settings.terminals == "admin" and caller.role < Role.ROLE_ADMIN:
            raise PermissionDenied(
                "Only administrators may open terminals here; EKIBEN_DEPLOYER_TERMINALS says so.", reason="ROLE_TOO_LOW"
            )

    async def _trusted(self, image: str) -> str:
        """The image to put beside a replica; where only signed ones may run, by the digest that was looked at."""
        if not image or self._gate is None or not self._gate.enforces:
            return image
        found = await prebuilt.pinned(image)
        named, _, digest = found.partition("@")
        await self._gate.look(found, digest)
        # Not every engine takes a tag and a digest at once.
        host, _, repository = named.removeprefix("docker://").partition("/")
        return f"{host}/{repository.partition(':')[0]}@{digest}"


def _chosen(sets: Sequence[SetStatus], replica: str, service: str, entry: str) -> tuple[str, str]:
    """The id and the service of the replica that is meant."""
    found = [(one, each) for one in sets for each in one.replicas if replica in ("", each.replica)]
    if replica and not found:
        raise NotFound(
            f"There is no replica {replica[:100]}; `ekiben deployments replicas` lists those that are there.",
            reason="REPLICA_NOT_FOUND",
            replica=replica[:100],
        )
    if not replica:
        wanted = service or entry
        found = [(one, each) for one, each in found if one.service == wanted]
        order = {Phase.READY: 0, Phase.UNREADY: 1, Phase.STARTING: 2, Phase.DRAINING: 3, Phase.CRASHED: 4}
        found.sort(key=lambda pair: (order[pair[1].phase], -pair[0].revision, pair[1].replica))
    if not found:
        raise FailedPrecondition(
            f"{service or entry or 'The deployment'} has no replica that runs; `ekiben deployments get` says why.",
            reason="REPLICA_NOT_RUNNING",
        )
    one, each = found[0]
    return each.replica, one.service
