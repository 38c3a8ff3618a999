"""What deployments are exposed by in their clusters, and what came of it."""

from collections.abc import Iterable

from services.deployer.addresses import CONDITION, Addresses
from services.deployer.domain import Condition, Deployment
from services.deployer.runtimes import Runtime
from services.deployer.runtimes.exposures import Exposed
from services.kernel.clock import Clock

COMPARE_S = 5.0
"""So often exposures are compared though nobody said that something of them changed."""


class Exposures:
    """See the module."""

    def __init__(self, runtime: Runtime, addresses: Addresses, clock: Clock) -> None:
        self._runtime, self._addresses, self._clock = runtime, addresses, clock
        self._came: dict[str, tuple[Exposed, object]] = {}
        """By the uid of the deployment: what it is exposed by, and what was seen to have come of it."""
        self._compare_at = 0.0
        self._told = False

    def reset(self) -> None:
        """Nothing is known, and the runtime was told nothing."""
        self._came.clear()
        self._told = False

    def forget(self, uid: str) -> None:
        """Keep nothing of a deployment."""
        self._came.pop(uid, None)

    def changed(self) -> None:
        """Rows are others than the runtime was told to expose."""
        self._told = False

    def look(self, deployment: Deployment) -> Condition | None:
        """What came of a deployment's; None where it has none."""
        exposed = self._addresses.exposed(deployment)
        if exposed is None:
            self.forget(deployment.uid)
            return None
        came = self._runtime.exposure(exposed)
        self._came[deployment.uid] = exposed, came
        return Condition(CONDITION, came.done, came.reason, came.message)

    def differing(self, *, moved: bool) -> set[str]:
        """Deployments for which something else came of it than at the last look. `moved`: the runtime said that
        something is another."""
        now = self._clock.monotonic()
        if not moved and now < self._compare_at:  # What it said may have been heard by a pass that came before.
            return set()
        self._compare_at = now + COMPARE_S
        return {uid for uid, (wanted, came) in self._came.items() if self._runtime.exposure(wanted) != came}

    async def tell(self, rows: Iterable[Deployment]) -> None:
        """Tell the runtime what to expose, unless it knows."""
        if self._told:
            return
        # Of the rows, not of the looks: what could not be looked at now must not lose its way in.
        living = [self._addresses.exposed(one) for one in rows if not one.deleting]
        await self._runtime.expose([one for one in living if one is not None])
        self._told = True
