"""Who runs the steps of lmdist-prepare on one machine: this process, or worker processes.

    with Workers(2, ["pandas"], is_own=True) as workers:
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
from contextlib import ExitStack, contextmanager, suppress
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

    def __init__(self, number: int, preload: Sequence[str] = (), *, is_own: bool) -> None:
        """Where this process `is_own`, running nothing else, the modules to `preload` are imported at once.

        They are imported here, or in a process of which the workers are copies. A user's program is left as it is.
        """
        self.number = number
        self.pool: ProcessPoolExecutor | None = None
        self.ending = ExitStack()
        if number > 1:
            context = self.ending.enter_context(own_context(preload)) if is_own else multiprocessing.get_context("spawn")
            self.progress = context.Array("q", 3 * number, lock=False)
            """Bytes, documents and tokens of each shard."""
            ours, self.lifeline = context.Pipe(duplex=False)
            self.pool = ProcessPoolExecutor(number, context, start_worker, (ours, self.progress))
        elif is_own:
            for name in preload:
                with suppress(ImportError):  # what needs it will say so
                    import_module(name)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self.ending:
            if self.pool is not None:
                if error is not None:
                    self.lifeline.close()
                try:
                    self.pool.shutdown(cancel_futures=True)
                finally:
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
        with worker_errors(self.pool, self.number):
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
        with worker_errors(self.pool, self.number):
            futures: deque[Future[Any]] = deque()
            for task in tasks:
                futures.append(self.pool.submit(function, *task))
                if len(futures) == CALLS_AHEAD * self.number:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()


@contextmanager
def own_context(preload: Sequence[str]) -> Iterator[BaseContext]:
    """Have processes start as copies of one that has begun to import the modules to `preload`, if that can be.

    Not by fork: the caller may be a training process with torch's threads in it. The server of forks has none, but for those
    that macOS's libraries start. It ends with the context. A process has one at most, and one that runs already is another's.
    """
    context: BaseContext = multiprocessing.get_context("spawn")
    server: Any = forkserver._forkserver  # no public name ends it
    with safe_path():
        if sys.platform != "linux" or server._forkserver_pid is not None:
            yield context
            return
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload([__name__, *preload])
        with suppress(OSError):  # the name of its socket is too long where that of TMPDIR is long
            forkserver.ensure_running()
            context = forks
        try:
            yield context
        finally:
            if server._forkserver_pid is not None:
                os.kill(server._forkserver_pid, signal.SIGKILL)  # by itself it would need a tenth of a second
            server._stop()
            forks.set_forkserver_preload(["__main__"])


@contextmanager
def safe_path() -> Iterator[None]:
    """Have Python processes that are started here import nothing from the folder in which the command runs.

    It is for processes that run nothing else: the environment is that of all their threads.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def worker_errors(pool: ProcessPoolExecutor, number: int) -> Iterator[None]:
    """Raise DataError where one of the pool's `number` worker processes was killed, or ended by itself."""
    try:
        yield
    except BrokenProcessPool:
        processes = [*(pool._processes or {}).values()]
        pool.shutdown(cancel_futures=True)  # it ends the others, and then all have an exit code
        codes = [process.exitcode for process in processes if process.exitcode is not None]
        if -signal.SIGKILL in codes:
            raise DataError(
                f"one of {number} worker processes was killed, most likely because the memory was full: "
                f"take fewer (--workers {max(1, number // 2)}), or more memory"
            ) from None
        code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
        how = f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        raise DataError(f"one of {number} worker processes ended {how}: --workers 1 does without them") from None


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
