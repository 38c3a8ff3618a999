"""A worker of BentoML's server, in which what is done for a batch belongs to the requests of that batch.

Usage: `python worker.py MODULE ARGUMENT…`, for `python -m MODULE ARGUMENT…`. Runs in the bento's environment.

A batchable endpoint merges requests, and BentoML's dispatcher carries every batch out in the context of the very first
request that the worker ever had: spans of calls to other services and monitored values of all later ones would be in
that one's trace. Here
- a batch is carried out in the context of its first request;
- of a monitor that logs as many rows as the batch has, each request gets its own;
- monitors are set up once, where threads that log their first values at the same time would each do it, so that some
  values were lost and all later ones sent twice.

Both are changed when they are imported, and left as they are where they look otherwise than is known.
Standard library only, and Python 3.7: bentos bring old environments.
"""

# mypy: ignore-errors
# ruff: noqa: SIM105

import asyncio
import collections
import contextvars
import importlib.util
import runpy
import sys
import threading
import weakref
from pathlib import Path

DISPATCHER = "bentoml._internal.marshal.dispatcher"
MONITOR = "bentoml._internal.monitoring.otlp"
BATCH = contextvars.ContextVar("ekiben_batch", default=())
"""Context and number of rows of each request in the batch that is carried out."""


def patch_dispatcher(module):
    """Carry batches out in the contexts of their requests."""
    contexts = weakref.WeakKeyDictionary()  # By the future of the request.
    dispatcher, make_job = module.CorkDispatcher, module.Job
    outbound = dispatcher.outbound_call
    split = getattr(dispatcher, "split_job", None)

    def job(*args, **kwargs):
        made = make_job(*args, **kwargs)
        contexts[made.future] = contextvars.copy_context()
        return made

    def split_job(self, job, *args, **kwargs):
        parts = split(self, job, *args, **kwargs)
        for part in parts:
            contexts[part.future] = contexts[job.future]
        return parts

    def rows(self, job):
        size = getattr(self, "get_batch_size", None)
        return int(size(job.data) if size else job.data.sample.batch_size)

    async def outbound_call(self, jobs, *args, **kwargs):
        first = contexts.get(jobs[0].future, contextvars.Context()).copy()
        try:
            batch = tuple((contexts[job.future], rows(self, job)) for job in jobs)
        except Exception:  # Of something that it cannot count: BentoML says so itself.
            batch = ()
        first.run(BATCH.set, batch)
        await first.run(asyncio.ensure_future, outbound(self, jobs, *args, **kwargs))

    module.Job = job
    dispatcher.outbound_call = outbound_call
    if split is not None:
        dispatcher.split_job = split_job


def patch_monitor(module):
    """Export the rows of a batch one request after the other, each in its own context; set exporters up once."""
    monitor = module.OTLPMonitor
    export, initialize = monitor.export_data, monitor._init_logger
    lock = threading.Lock()
    loggers = {}

    def init_logger(self):
        where = (self.endpoint, self.headers)
        with lock:
            if self.data_logger is None and where in loggers:
                self.data_logger = loggers[where]
            elif self.data_logger is None:
                initialize(self)
                # It is one logger for all monitors, and leads where the last one was told to.
                loggers.clear()
                loggers[where] = self.data_logger

    def export_data(self, datas):
        batch = BATCH.get()
        count = sum(size for _, size in batch)
        if not batch or any(len(column) != count for column in datas.values()):
            export(self, datas)
            return
        for context, size in batch:
            own = {name: collections.deque(column.popleft() for _ in range(size)) for name, column in datas.items()}
            context.copy().run(export, self, own)

    monitor.export_data, monitor._init_logger = export_data, init_logger


class PatchingFinder:
    """Changes modules when they are imported, which a worker may do late or never."""

    def __init__(self, patches):
        self._patches = dict(patches)

    def find_spec(self, name, path=None, target=None):
        """The module's own spec, which changes it at the end of its import."""
        patch = self._patches.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                patch(module)
            except AttributeError:  # Of a BentoML that has it otherwise.
                pass

        spec.loader.exec_module = exec_module
        return spec


def main(argv):
    """Run the worker."""
    sys.meta_path.insert(0, PatchingFinder({DISPATCHER: patch_dispatcher, MONITOR: patch_monitor}))
    sys.path[0] = str(Path.cwd())  # As `-m` has it; the folder of this file is no place to import from.
    sys.argv = argv[1:]
    runpy.run_module(argv[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv)
