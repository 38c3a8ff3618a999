"""What is in the cluster, kept by watches: asking costs no call."""

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ekiben.errors import Aborted, EkibenError
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.names import Object, label
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

Heard = Callable[[str, Object | None], None]
"""Called with the kind and the object that is another than before, or none when only the fault changed."""

_PAUSES_S = (0.2, 1.0, 3.0, 10.0)
_OF_PODS = ("nodeName", "readinessGates")
"""What is kept of a pod's spec: it is the largest part, and there are many."""
_WORD_CHARS = 64


class Cache:
    """All objects of a kind with these labels."""

    def __init__(self, api: Api, kind: str, selector: str, heard: Heard, clock: Clock) -> None:
        self._api, self._kind, self._selector = api, kind, selector
        self._heard, self._clock = heard, clock
        self.objects: dict[str, Object] = {}
        """By name. Not to be changed by who reads them."""
        self.filled = asyncio.Event()
        """Set once the first list has come."""
        self.fault = ""
        """Why it is not up to date, in words; empty while it is."""
        self.reason = ""
        """The same for programs."""

    async def run(self) -> None:
        """Keep it, for ever."""
        version, failures = "", 0
        while True:
            try:
                if version and await self._is_set_back(version):
                    version = ""
                if not version:
                    items, version = await self._api.listed(
                        self._kind,
                        self._selector,
                        kept=partial(_trimmed, self._kind),  # page by page: whole, 10,000 pods are half a gigabyte
                    )
                    self._replace(items)
                    failures = 0
                    self._healed()
                    self.filled.set()
                async for event, item in self._api.watch(self._kind, self._selector, version, self._healed):
                    version, failures = item["metadata"]["resourceVersion"], 0
                    self._take(event, item)
            except Aborted:
                version = ""
            except EkibenError as exc:
                if not self.fault:
                    log.warning("a watch was lost", extra={"kind": self._kind, "error": exc.message})
                self.fault, self.reason = exc.message, exc.reason
                self._heard(self._kind, None)
                await self._clock.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
                if failures > 1:
                    version = ""  # It was away, and nobody knows what was restored meanwhile.

    async def _is_set_back(self, version: str) -> bool:
        """Whether the cluster has not reached a version again that it had, as etcd was restored from before: a watch
        from there would be silent for long, or for ever."""
        newest = await self._api.newest(self._kind)
        return newest.isdigit() and version.isdigit() and int(newest) < int(version)

    def put(self, item: Object) -> None:
        """What a write has answered: the watch tells of it only later, and until then it would be written again."""
        self.objects[item["metadata"]["name"]] = _trimmed(self._kind, item)

    def _replace(self, items: list[Object]) -> None:
        before, self.objects = self.objects, {}
        for item in items:
            item["kind"] = self._kind  # Which a list says only once.
            self.objects[item["metadata"]["name"]] = item
        for name, item in self.objects.items():
            old = before.pop(name, None)
            if old is None or old["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                self._heard(self._kind, item)
        for item in before.values():
            self._heard(self._kind, item)

    def _take(self, event: str, item: Object) -> None:
        if event == "BOOKMARK":
            return
        name = item["metadata"]["name"]
        known = self.objects.get(name)
        if event == "DELETED":
            if known is None or known["metadata"]["uid"] != item["metadata"]["uid"]:
                return  # It was made anew meanwhile.
            del self.objects[name]
        else:
            if known is not None and _older(item, known):
                return
            self.objects[name] = _trimmed(self._kind, item)
        self._heard(self._kind, item)

    def _healed(self) -> None:
        if self.fault:
            self.fault = self.reason = ""
            self._heard(self._kind, None)


class ByLabel:
    """Objects of a kind by the value of a label, as a cache tells of them."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._labelled: dict[str, str] = {}
        self._found: dict[str, dict[str, Object]] = {}

    def of(self, value: str) -> Mapping[str, Object]:
        """Those with this value, by name."""
        return self._found.get(value, {})

    def heard(self, name: str, item: Object | None) -> set[str]:
        """An object is another than before, or none any more. Gives the values for which `of` is another."""
        touched = set()
        if (before := self._labelled.pop(name, None)) is not None:
            touched.add(before)
            del self._found[before][name]
            if not self._found[before]:
                del self._found[before]
        if item is not None:
            value = label(item, self._label)
            self._labelled[name] = value
            self._found.setdefault(value, {})[name] = item
            touched.add(value)
        return touched


def _older(item: Object, known: Object) -> bool:
    """Whether the news is of before what a write answered."""
    one, other = item["metadata"]["resourceVersion"], known["metadata"]["resourceVersion"]
    return bool(one.isdigit() and other.isdigit() and int(one) < int(other))


def _trimmed(kind: str, item: Object) -> Object:
    item["metadata"].pop("managedFields", None)
    if kind == "Pod":
        item["spec"] = {key: item["spec"][key] for key in _OF_PODS if key in item["spec"]}
        return dict(_shared(item))
    return item


def _shared(value: Any) -> Any:
    """The same with words that thousands of pods have in common kept once: half of the memory."""
    if isinstance(value, dict):
        return {sys.intern(key): _shared(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shared(one) for one in value]
    return sys.intern(value) if isinstance(value, str) and len(value) <= _WORD_CHARS else value
