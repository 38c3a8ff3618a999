"""The four deployment strategies of the client on Kubernetes: what each has the cluster do, by its watch.

The pods answer their probes and nothing else, by a patch, as what is looked at is how many there are.
"""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from tests.platform import BentoMl, Platform, wait_for

REPLICAS = 2
ANSWER = """
import http.server, os, signal
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("", 3000), Ready).serve_forever()
"""


class Asked:
    """How many replicas each revision was asked to have, after each change."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.seen: list[dict[str, int]] = []

    def take(self, event: Any) -> None:
        """An event of a watch of Deployments."""
        item = event["object"]
        revision = item["metadata"]["labels"]["app.kubernetes.io/version"]
        gone = event["type"] == "DELETED" or item["metadata"].get("deletionTimestamp")
        self.now = {**self.now, revision: 0 if gone else item["spec"]["replicas"]}
        self.seen.append(self.now)


@contextmanager
def watched(cluster: Cluster, namespace: str, name: str) -> Iterator[Asked]:
    """What is asked while inside."""
    url = f"/apis/apps/v1/namespaces/{namespace}/deployments?watch=true&labelSelector=app.kubernetes.io/name={name}"
    command = ["kubectl", "--kubeconfig", str(cluster.kubeconfig), "get", "--raw", url]
    told = Asked()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as kubectl:
        assert kubectl.stdout is not None
        lines = kubectl.stdout

        def listen() -> None:
            for line in lines:
                told.take(json.loads(line))

        listening = threading.Thread(target=listen)
        listening.start()
        try:
            wait_for("the watch", lambda: told.seen, 60)
            yield told
        finally:
            kubectl.terminate()
            listening.join()


def test_each_strategy_has_its_own_way_from_one_revision_to_the_next(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path: Path,
) -> None:
    ekiben = kubernetes_platform.ekiben
    tag = kubernetes_bentoml("build", ".", "-o", "tag", cwd=bentos / "versions").stdout.strip().removeprefix("__tag__:")
    kubernetes_bentoml("push", tag)
    patch = {"spec": {"containers": [{"name": "bento", "command": ["python", "-c", ANSWER]}]}}
    (tmp_path / "pod.json").write_text(json.dumps({"patch": patch}))
    like = ("--replicas", str(REPLICAS), "--pod", str(tmp_path / "pod.json"))
    ekiben("deployments", "create", tag, "-n", "ways", *like, timeout_s=500)
    ways: dict[str, list[dict[str, int]]] = {}
    with watched(cluster, kubernetes_namespace, "ways") as told:
        wait_for("two replicas", lambda: told.now == {"r1": REPLICAS}, 60)
        strategies = ("RollingUpdate", "RampedSlowRollout", "BestEffortControlledRollout", "Recreate")
        for number, strategy in enumerate(strategies, 2):
            begin = len(told.seen)
            ekiben("deployments", "update", "ways", "--strategy", strategy, "--env", f"N={number}", timeout_s=500)
            new, former = f"r{number}", f"r{number - 1}"
            done = {new: REPLICAS, former: 0}
            wait_for(f"{strategy} done", lambda done=done: done.items() <= told.now.items(), 120)  # type: ignore[misc]
            ways[strategy] = [{"new": one.get(new, 0), "old": one.get(former, 0)} for one in told.seen[begin:]]
    totals = {strategy: [one["new"] + one["old"] for one in seen] for strategy, seen in ways.items()}
    for strategy in ("RollingUpdate", "RampedSlowRollout"):  # One more, and never fewer.
        assert (min(totals[strategy]), max(totals[strategy])) == (REPLICAS, REPLICAS + 1), ways[strategy]
    best = totals["BestEffortControlledRollout"]  # One fewer, and never more.
    assert (min(best), max(best)) == (REPLICAS - 1, REPLICAS), ways["BestEffortControlledRollout"]
    # All of the old, then all of the new.
    assert all(not (one["new"] and one["old"]) for one in ways["Recreate"]), ways["Recreate"]
    assert 0 in totals["Recreate"]
    ekiben("deployments", "delete", "ways", "--yes")
