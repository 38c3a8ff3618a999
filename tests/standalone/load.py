"""Constant load on one deployment, from a thread, that counts every request which did not succeed."""

import http.client
import threading
import time
import urllib.parse
from dataclasses import dataclass, field


@dataclass
class Load:
    """A closed loop of POSTs over `connections` connections; use it in a `with` block, then read what happened."""

    url: str
    path: str
    body: bytes = b"{}"
    connections: int = 2
    interval_s: float = 0.01
    answers: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self.connections)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    @property
    def count(self) -> int:
        """How many requests have been answered well."""
        with self._lock:
            return sum(self.answers.values())

    def _run(self) -> None:
        netloc = urllib.parse.urlsplit(self.url).netloc
        connection = http.client.HTTPConnection(netloc, timeout=60)
        while not self._stop.is_set():
            began = time.strftime("%H:%M:%S")
            try:
                connection.request("POST", self.path, self.body, {"content-type": "application/json"})
                response = connection.getresponse()
                text = response.read().decode(errors="replace")
                with self._lock:
                    if response.status == 200:
                        self.answers[text] = self.answers.get(text, 0) + 1
                    else:
                        self.failures.append(f"{began} {response.status} {text[:300]}")
            except (OSError, http.client.HTTPException) as exc:
                connection.close()
                with self._lock:
                    self.failures.append(f"{began} {exc!r}")
            self._stop.wait(self.interval_s)
        connection.close()
