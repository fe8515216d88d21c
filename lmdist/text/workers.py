"""Who runs the steps of lmdist-prepare on one machine: this process, or worker processes.

    with Workers(2, preload=["pandas"]) as workers:
        workers.count(tasks, learn, folder / "text.json", progress.show)        # counting.count(*task, ...)
        for found in workers.run(encode, tasks):                                # encode(*task), ...
            ...

This module does not know what the steps do.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import Any

from lmdist.errors import DataError
from lmdist.storage.atomic import atomic_path
from lmdist.text.counting import Report, Sources, count
from lmdist.text.tokenizer import WordTokenizer

Task = tuple[Any, ...]
"""The arguments of a call."""
CountTask = tuple[Path, Sources, int]
"""Those of `count`: folder, sources and seed."""
Learn = Callable[[], WordTokenizer]
"""Returns the tokenizer of all shards; it goes to another process."""

SECONDS_BETWEEN_REPORTS = 0.5
SECONDS_BETWEEN_LOOKS = 0.02
CALLS_AHEAD = 2
"""For each process: so many calls wait for it, or have returned what nobody has asked for yet."""


class Workers:
    """Worker processes of this machine, or this process alone; on any error they end with the context."""

    def __init__(self, number: int, preload: Sequence[str] = ()) -> None:
        """The modules to `preload` are imported at once, here or in a process of which the workers are copies."""
        self.number = number
        self.pool: ProcessPoolExecutor | None = None
        if number == 1:
            for name in preload:
                with suppress(ImportError):  # what needs it will say so
                    import_module(name)
        else:
            context = started_context(preload)
            self.progress = context.Array("q", 3 * number, lock=False)
            """Bytes, documents and tokens of each shard."""
            ours, self.lifeline = context.Pipe(duplex=False)
            self.pool = ProcessPoolExecutor(number, context, start_worker, (ours, self.progress))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pool is not None:
            if error is not None:
                self.lifeline.close()
            self.pool.shutdown(cancel_futures=True)
            self.lifeline.close()

    def count(self, tasks: Sequence[CountTask], learn: Learn, text_json: Path, show: Report) -> None:
        """Count a shard for each of as many tasks as there are processes; tell `show` how far they are together.

        The first process learns the tokenizer, from the text of its own shard, while the others read up to theirs, and they
        find it in `text_json`.
        """
        if self.pool is None:
            tokenizer = learn()
            for task in tasks:
                count(*task, lambda: tokenizer, show)
            return
        with worker_errors(self.number):
            calls = [(index, learn if index == 0 else None, text_json, task) for index, task in enumerate(tasks)]
            pending = {self.pool.submit(count_in_worker, *call) for call in calls}
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_REPORTS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                values = list(self.progress)
                if any(values):
                    show(sum(values[0::3]), sum(values[1::3]), sum(values[2::3]))

    def run(self, function: Callable[..., Any], tasks: Iterable[Task]) -> Iterator[Any]:
        """Yield the results of a function for several tuples of arguments, in order; few of either are held at a time."""
        if self.pool is None:
            yield from (function(*task) for task in tasks)
            return
        with worker_errors(self.number):
            futures: deque[Future[Any]] = deque()
            for task in tasks:
                futures.append(self.pool.submit(function, *task))
                if len(futures) == CALLS_AHEAD * self.number:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()


def started_context(preload: Sequence[str]) -> BaseContext:
    """Return how processes are started: as copies of one that has begun to import the modules to `preload`, if that can be.

    Not by fork: the caller may be a training process with torch's threads in it. The server of forks has none, but for those
    that macOS's libraries start.
    """
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *preload])
        with suppress(OSError), safe_path():  # the name of its socket is too long where that of TMPDIR is long
            forkserver.ensure_running()
            return context
    return multiprocessing.get_context("spawn")


@contextmanager
def safe_path() -> Iterator[None]:
    """Have Python processes that are started here import nothing from the folder in which the command runs."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def worker_errors(number: int) -> Iterator[None]:
    """Raise DataError where one of `number` worker processes was killed."""
    try:
        yield
    except BrokenProcessPool:
        raise DataError(
            f"one of {number} worker processes was killed, most likely because the memory was full: "
            f"take fewer (--workers {max(1, number // 2)}), or more memory"
        ) from None


shared_progress: Any


def start_worker(lifeline: Connection, progress: Any) -> None:
    """Leave Ctrl-C to the parent, and end when it does or lets go of the lifeline: a pool's workers would wait forever."""
    global shared_progress
    shared_progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what was imported stays; looking through it for garbage would also copy it from the server of forks

    def end_with_parent() -> None:
        try:
            lifeline.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def count_in_worker(index: int, learn: Learn | None, text_json: Path, task: CountTask) -> None:
    """Count a shard, and tell the parent how far it is; first learn the tokenizer, or wait until another process has."""
    if learn is not None:
        with atomic_path(text_json) as path:
            learn().save(path)

    def learned() -> WordTokenizer:
        while not text_json.exists():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return WordTokenizer.load(text_json)

    def report(*done: int) -> None:
        shared_progress[3 * index : 3 * index + 3] = done

    count(*task, learned, report)
