"""What the runtime makes of what its watches told, without a cluster: no call is made here."""

import json
import math
from datetime import UTC, datetime
from typing import Any

from ekiben.errors import PermissionDenied
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.exposing import Exposures
from services.deployer.runtimes.kubernetes.keeping import Asked
from services.deployer.runtimes.kubernetes.names import ABOUT, SET, Where, name_of
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime
from services.kernel.clock import ManualClock

WHERE = Where("installation", "models")


def pod(key: str, label: str | None) -> dict[str, Any]:
    about = {"deployment": "deployments/d", "deployment_uid": "u", "revision": 1, "target": "main", "service": "S"}
    return {
        "metadata": {
            "name": f"{name_of(key)}-5f6d-x2x1",
            "uid": "p1",
            "resourceVersion": "7",
            "labels": {} if label is None else {SET: label},
            "annotations": {ABOUT: json.dumps(about)},
        },
        "spec": {},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }


async def seen(runtime: KubernetesRuntime, item: dict[str, Any]) -> list[str]:
    runtime._caches["Pod"].objects[item["metadata"]["name"]] = item
    runtime._heard("Pod", item)
    return [one.key for one in await runtime.observe()]


async def test_a_pod_whose_label_somebody_changed_to_look_into_it_is_of_no_set() -> None:
    runtime = KubernetesRuntime(None, WHERE)  # type: ignore[arg-type]
    assert await seen(runtime, pod("aaaa", "aaaa")) == ["aaaa"]
    assert await seen(runtime, pod("aaaa", None)) == []
    assert await seen(runtime, pod("aaaa", "quarantine")) == []
    assert await seen(runtime, pod("aaaa", "aaaa")) == ["aaaa"]


async def test_it_knows_what_is_there_once_the_lists_have_come() -> None:
    runtime = KubernetesRuntime(None, WHERE)  # type: ignore[arg-type]
    for kind, cache in runtime._caches.items():
        if kind != "Deployment":
            cache.filled.set()
    assert not runtime.knows("")
    runtime._caches["Deployment"].filled.set()
    assert runtime.knows("")


def test_what_was_refused_while_it_was_being_applied_is_tried_no_more() -> None:
    asked = Asked(SetSpec("a", "deployments/d", "u", 1, "main", "S", True, False, "b", "", (), ""), 1)
    asked.refused("IMAGE_NOT_SIGNED", "It has no signature.")
    asked.failed("KUBERNETES_AWAY", "No answer.", 10.0)
    assert asked.again_at == math.inf and asked.fault == "It has no signature."


class Refusing:
    """An API that lets nothing be deleted, at first."""

    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.refuses = True

    async def delete(self, kind: str, name: str) -> None:
        self.deleted.append(name)
        if self.refuses:
            raise PermissionDenied("You may not.", reason="FORBIDDEN")


async def test_an_exposure_that_could_not_be_taken_away_is_tried_again() -> None:
    api, clock = Refusing(), ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
    exposures = Exposures(api, WHERE, "ekiben:80", clock, lambda: None)  # type: ignore[arg-type]
    exposures._caches["Ingress"].objects["left"] = {"metadata": {"name": "left"}}
    exposures.want([])
    await exposures._turn()
    pause_s = exposures._pause_s()
    assert api.deleted == ["left"] and pause_s is not None
    api.refuses = False
    await clock.advance(pause_s)
    await exposures._turn()
    assert api.deleted == ["left", "left"] and exposures._pause_s() is None
