"""The files that Envoy reads: each written whole beside its place, then renamed.

Each carries a version made from its content, so that writing what is there already changes nothing, and Envoy's
statistics show which content it uses.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from services.content.files import write_whole
from services.gateway.messages import Resource


class Files:
    """The folder: bootstrap.json, listeners.json, clusters.json, routes/NAME.json and endpoints/NAME.json.

    It holds the suite's token, so only its user may enter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listeners = folder / "listeners.json"
        self.clusters = folder / "clusters.json"
        self.bootstrap = folder / "bootstrap.json"
        self._routes = folder / "routes"
        self._endpoints = folder / "endpoints"
        self._versions: dict[Path, str] = {}
        for each in (folder, self._routes, self._endpoints):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)

    def routes(self, name: str) -> Path:
        """The file of a route configuration."""
        return self._routes / f"{name}.json"

    def endpoints(self, cluster: str) -> Path:
        """The file of a cluster's endpoints."""
        return self._endpoints / f"{cluster}.json"

    def write(self, path: Path, resources: Sequence[Resource]) -> str:
        """Write a file unless it holds this already. Gives its version.

        Raises:
            OSError: it cannot be written; the old file stays.
        """
        text = json.dumps({"resources": list(resources)}, separators=(",", ":"), sort_keys=True)
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not self.holds(path, version):
            put(path, f'{{"version_info":"{version}",{text[1:]}')
            self._versions[path] = version
        return version

    def holds(self, path: Path, version: str) -> bool:
        """Whether a file of this version is there."""
        return self._versions.get(path) == version and path.exists()

    def keep_only(self, *, routes: Iterable[str], clusters: Iterable[str]) -> None:
        """Delete the files of route configurations and clusters that are no more."""
        wanted = {self.routes(name) for name in routes} | {self.endpoints(name) for name in clusters}
        for folder in (self._routes, self._endpoints):
            for path in folder.iterdir():
                if path not in wanted:
                    path.unlink(missing_ok=True)
                    self._versions.pop(path, None)


def put(path: Path, content: str) -> None:
    """Write a file unless it holds this already: a start on a full disk has nothing to write.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    data = content.encode()
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return
    write_whole(path, data, durable=False)


def live(versions: Mapping[str, str], statistics: Mapping[str, str]) -> bool:
    """Whether Envoy uses these versions; `versions` are by the name of the statistic that shows them."""
    return all(statistics.get(name) == version for name, version in versions.items())
