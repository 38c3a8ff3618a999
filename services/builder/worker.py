"""The loop that builds: lease, fetch, find a Python, resolve, install, report."""

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import Counter, Histogram

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import Aborted, DeadlineExceeded, EkibenError, ResourceExhausted, Unavailable
from ekiben.identity.v1 import identity_pb2, identity_pb2_grpc
from services.builder import bento, failures, image_builds
from services.builder.domain import MOST_ATTEMPTS, Build, Environment, Failure, Image, Lease, Step, progress
from services.builder.engine import Secret
from services.builder.environments import Environments
from services.builder.image_builds import Source
from services.builder.image_work import Fetch, ImageWork
from services.builder.interpreters import Interpreters
from services.builder.locks import Locks, Work
from services.builder.logs import BuildLog, BuildLogs
from services.builder.queue import QUEUED, lease_of
from services.builder.recipe import make_recipe
from services.builder.settings import Settings
from services.builder.store import Store
from services.content.images import Platform
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.identity import Principal
from services.kernel.leases import Vigil
from services.kernel.peers import on_behalf_of
from services.kernel.watches import Topic

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 2.0
"""How soon a build that another process queued, or whose worker died, is seen; a build queued here wakes the loop."""
_PATIENCE_S = 60.0
"""How long a build waits for a registry that is away: a restart of the suite takes seconds."""
_REPORT_EVERY_S = 0.25
"""Between two writes of the progress within a step."""

_builds = Counter(
    "ekiben_builds_total", "Builds that ended, by how: succeeded, cached, failed, cancelled.", ["outcome"]
)
_duration = Histogram(
    "ekiben_build_duration_seconds",
    "Time from a worker taking a build to its end.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
)


@dataclass(frozen=True)
class Made:
    """What a build made."""

    environment: Environment | None
    image: Image | None
    cached: bool
    """Whether it was there."""
    of: Build
    """The build with the content that it is made from."""


async def _pass(_step: str) -> None:
    """What a test puts its faults in place of."""


class Worker:
    """Takes builds from the queue, one after another, `settings.workers` at a time."""

    def __init__(
        self,
        store: Store,
        locks: Locks,
        environments: Environments,
        interpreters: Interpreters,
        logs: BuildLogs,
        changes: Topic,
        fetch: Fetch,
        image_work: ImageWork,
        vault: "identity_pb2_grpc.SecretsAsyncStub",
        settings: Settings,
        owner: str,
        clock: Clock,
        failpoint: Callable[[str], Awaitable[None]] = _pass,
    ) -> None:
        self._store = store
        self._locks = locks
        self._environments = environments
        self._interpreters = interpreters
        self._logs = logs
        self._changes = changes
        self._fetch = fetch
        self._image_work = image_work
        self._vault = vault
        self._settings = settings
        self._owner = owner
        self._clock = clock
        self._failpoint = failpoint
        self._vigil = Vigil(settings.lease_s, clock)
        self._tmp = settings.data_dir / "tmp"

    async def run(self) -> None:
        """Build until cancelled. What is being built then goes back to the queue."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.workers):
                group.create_task(self._take())

    async def _take(self) -> None:
        async for _ in self._changes.changes(QUEUED, at_most_s=_LOOK_AGAIN_S):
            while (lease := await self._lease()) is not None:
                try:
                    await self._advance(lease)
                except (EkibenError, OSError) as error:
                    # How it ended cannot be written down, as on a full disk: it goes on from where others find it.
                    log.error("a build was left", extra={"build": lease.build.id, "error": str(error)})
                    await self._give_back(lease)
                    await self._clock.sleep(_LOOK_AGAIN_S)

    async def _lease(self) -> Lease | None:
        """A build that waits, or one whose worker shows no sign of life any more."""
        token, now = secrets.token_hex(16), self._clock.now()
        try:
            if (lease := await self._store.lease(token, self._owner, now)) is not None:
                return lease
            signs = await self._store.signs_of_life()
            for build in self._vigil.silent(signs):
                lease = await self._store.take_over(build, signs[build], token, self._owner, now)
                if lease is not None:
                    log.warning("a build was taken over", extra={"build": build})
                    return lease
        except EkibenError as error:
            log.warning("no build can be leased", extra={"reason": error.reason})
        return None

    async def _advance(self, lease: Lease) -> None:
        """Build, and write down how it ended; raises only when it is cancelled itself."""
        build = lease.build
        started = time.monotonic()
        directory = self._tmp / f"{build.id}-{lease.token[:8]}"
        written = self._logs.open(build.id)
        outcome = "failed"
        try:
            with telemetry.continue_trace(build.traceparent, "build", build=build.id, bento=build.bento):
                outcome = await self._build(lease, directory, written)
        except asyncio.CancelledError:
            written.write("The builder is stopping; the build goes on when it is back.")
            await asyncio.shield(self._give_back(lease))
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            written.close()
            self._changes.notify(build.id)
        if outcome != "lost":
            duration_s = time.monotonic() - started
            _builds.labels(outcome).inc()
            _duration.observe(duration_s)
            log.info("build ended", extra={"build": build.id, "outcome": outcome, "duration_s": round(duration_s, 3)})

    async def _build(self, lease: Lease, directory: Path, written: BuildLog) -> str:
        """The outcome, for the metric: `succeeded`, `cached`, `failed`, `cancelled`, `lost`."""
        build = lease.build
        if build.attempts > MOST_ATTEMPTS:
            failure = Failure(
                "WORKER_LOST",
                f"The builder died {MOST_ATTEMPTS} times while it built this. Look into its own log, and how much "
                "memory it has.",
            )
            return await self._fail(lease, failure, written)
        if build.attempts > 1:
            written.write(f"The build is taken up again (attempt {build.attempts}).")
        try:
            made = await self._holding(lease, directory, written)
        except EkibenError as error:
            if error.reason == "LEASE_LOST":
                written.write("The build was cancelled.")
                return "cancelled" if await self._was_cancelled(build) else "lost"
            return await self._fail(lease, failures.of_error(error), written)
        except OSError as error:
            return await self._fail(lease, _of_os_error(error), written)
        except Exception:
            log.exception("a build failed by a bug", extra={"build": build.id})
            return await self._fail(lease, Failure("INTERNAL", "The builder has a bug; its log says more."), written)
        now = self._clock.now()
        kept = await self._store.succeed(
            build.id, lease.token, made.environment, made.cached, now, made.image, made_from=made.of
        )
        if kept and made.image is not None:
            # Whoever deleted the same image while this was built may have taken its references after they were given.
            try:
                await self._image_work.place.restore(made.image)
            except (EkibenError, OSError) as error:
                log.warning("an image may lack references", extra={"build": build.id, "error": str(error)})
        return ("cached" if made.cached else "succeeded") if kept else "lost"

    async def _holding(self, lease: Lease, directory: Path, written: BuildLog) -> Made:
        """Build while the lease is kept. Raises Aborted (LEASE_LOST) as soon as it is lost."""
        making = asyncio.ensure_future(self._make(lease, directory, written))
        keeping = asyncio.ensure_future(self._keep(lease))
        try:
            async with asyncio.timeout(self._settings.build_timeout_s):
                await asyncio.wait([making, keeping], return_when=asyncio.FIRST_COMPLETED)
                return making.result() if making.done() else keeping.result()
        except TimeoutError:
            raise DeadlineExceeded(
                f"The build did not end within {self._settings.build_timeout_s:.0f} s.", reason="BUILD_TIMEOUT"
            ) from None
        finally:
            for task in (making, keeping):
                task.cancel()
            await asyncio.wait([making, keeping])
            for task in (making, keeping):
                if not task.cancelled():
                    task.exception()  # was raised above, or no longer matters

    async def _keep(self, lease: Lease) -> Made:
        """Renew the lease until it is lost."""
        async for _ in self._changes.changes(lease_of(lease.build.id), at_most_s=self._settings.lease_s / 3):
            try:
                kept = await self._store.renew(lease.build.id, lease.token)
            except (Unavailable, ResourceExhausted, Aborted):
                continue  # the database may be back in time; each write is fenced anyway
            if not kept:
                break
        raise _lost()

    async def _make(self, lease: Lease, directory: Path, written: BuildLog) -> Made:
        build = lease.build
        report = _Reports(self._store, self._changes, lease)
        written.write(f"Building {build.bento} ({build.bento_digest}).")
        await asyncio.to_thread(directory.mkdir, parents=True)

        await report(Step.FETCHING)
        await self._failpoint("fetch")
        with telemetry.tracer().start_as_current_span("fetch bento"):
            env = await self._reveal(build, written)
            content = directory / "bento"
            digest = await self._fetch_patiently(build, content, written)
            if digest != build.bento_digest:
                written.write(f"The bento was pushed again meanwhile; its content is {digest} now, and that is built.")
                build = replace(build, bento_digest=digest)
                if not await self._store.found(build, lease.token):
                    raise _lost()
            files = await asyncio.to_thread(bento.read, content)
        if build.output.is_image:
            image_builds.check(files, self._image_work.engine, [Platform.parse(each) for each in build.platforms])
        recipe = make_recipe(files)
        for note in recipe.notes:
            if not build.output.is_image or note not in recipe.skipped:
                written.write(note)
        work = Work(directory, written.write, report, env, build.organization)
        if build.output.is_image:
            secrets = [Secret(name, value) for name, value in env.items()]
            source = Source(content, files, recipe, secrets=secrets, refresh_commands=build.force)
            return await self._make_image(build, source, work)

        await report(Step.FINDING_PYTHON)
        await self._failpoint("python")
        with telemetry.tracer().start_as_current_span("find python"):
            interpreter = await self._interpreters.find(recipe.python, written.write)
        written.write(f"Python {interpreter.version} at {interpreter.path}, BentoML {recipe.bentoml_version}.")

        await report(Step.RESOLVING)
        await self._failpoint("resolve")
        with telemetry.tracer().start_as_current_span("resolve requirements"):
            lock = await self._locks.make(recipe, interpreter, content, work, fresh=build.force)

        await report(Step.INSTALLING)
        await self._failpoint("install")
        with telemetry.tracer().start_as_current_span("install packages"):
            environment, cached = await self._environments.make(lock, recipe, interpreter, work, verify=build.force)
        written.write(f"Environment {environment.digest} is {'there already' if cached else 'ready'}.")
        await self._failpoint("finish")
        return Made(environment, None, cached, build)

    async def _make_image(self, build: Build, source: Source, work: Work) -> Made:
        await self._failpoint("assemble")
        with telemetry.tracer().start_as_current_span("assemble image"):
            image, build, cached = await self._image_work.make(build, source, work)
        work.say(f"Image {image.digest} is {'there already' if cached else 'ready'}: images/{image.id}.")
        await self._failpoint("finish")
        return Made(None, image, cached, build)

    async def _fetch_patiently(self, build: Build, into: Path, written: BuildLog) -> str:
        """Unpack the build's bento; the digest of its content."""
        deadline = self._clock.monotonic() + _PATIENCE_S
        pause_s = 0.2
        while True:
            try:
                return await self._fetch(build.bento, into)
            except Unavailable as error:
                if self._clock.monotonic() > deadline:
                    raise
                written.write(f"{error.message} Trying again.")
                await self._clock.sleep(pause_s)
                pause_s = min(5.0, pause_s * 2)

    async def _reveal(self, build: Build, written: BuildLog) -> dict[str, str]:
        """The values of the build's secrets, by variable; masked in the log from here on."""
        if not build.secrets:
            return {}
        asking = Principal(build.creator, build.organization, Role.ROLE_DEVELOPER)
        with on_behalf_of(asking):  # so that the audit log names who caused it
            reply = await self._vault.RevealSecrets(identity_pb2.RevealSecretsRequest(names=build.secrets))
        env: dict[str, str] = {}
        for secret in reply.secrets:
            if secret.stage == identity_pb2.Secret.RUNTIME:
                written.write(f"{secret.name} is for replicas only; the build does not get it.")
            elif secret.kind == identity_pb2.Secret.MOUNT_FILE:
                written.write(f"{secret.name} holds files; a build gets environment variables only.")
            else:
                env |= {item.key: item.value for item in secret.items}
        written.mask(env.values())
        return env

    async def _fail(self, lease: Lease, failure: Failure, written: BuildLog) -> str:
        message = written.masked(failure.message)
        metadata = {key: written.masked(value) for key, value in failure.metadata.items()}
        written.write(f"FAILED ({failure.reason}): {message}")
        failure = Failure(failure.reason, message, metadata)
        kept = await self._store.fail(lease.build.id, lease.token, failure, self._clock.now())
        return "failed" if kept else "lost"

    async def _was_cancelled(self, build: Build) -> bool:
        now = await self._store.get(build.organization, build.id)
        return now is not None and now.state == "CANCELLED"

    async def _give_back(self, lease: Lease) -> None:
        try:
            await self._store.give_back(lease.build.id, lease.token)
        except EkibenError:
            log.warning("a build could not be given back; its lease runs out", extra={"build": lease.build.id})


class _Reports:
    """Writes a build's progress to the store, at most four times a second within a step."""

    def __init__(self, store: Store, changes: Topic, lease: Lease) -> None:
        self._store = store
        self._changes = changes
        self._lease = lease
        self._percent = 0
        self._last: tuple[str, int] = ("", -1)
        self._next = 0.0

    async def __call__(self, step: Step, done: int = 0, of: int = 0) -> None:
        """Say that `done` of `of` parts of a step are done. Raises Aborted (LEASE_LOST)."""
        text = f"downloading packages ({done} of {of})" if step is Step.INSTALLING and done < of else str(step)
        # An image for several platforms goes through its steps several times.
        self._percent = max(self._percent, progress(step, done, of, self._lease.build.output))
        state = (text, self._percent)
        now = time.monotonic()
        if state == self._last or (state[0].split("(")[0] == self._last[0].split("(")[0] and now < self._next):
            return
        self._last, self._next = state, now + _REPORT_EVERY_S
        try:
            kept = await self._store.report(self._lease.build.id, self._lease.token, *state)
        except (Unavailable, ResourceExhausted, Aborted):
            return  # a database that is away for a while fails no build: this is for readers only
        if not kept:
            raise _lost()
        self._changes.notify(self._lease.build.id)


def _lost() -> Aborted:
    return Aborted("The build was cancelled, or another worker has it.", reason="LEASE_LOST")


def _of_os_error(error: OSError) -> Failure:
    failure = failures.parse(f"{error} (os error {error.errno})", doing="working on files")
    return (
        failure
        if failure.reason == "DISK_FULL"
        else Failure("INTERNAL", f"The builder cannot work on its files: {error}")
    )
