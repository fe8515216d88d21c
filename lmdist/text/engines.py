"""Who runs the steps of lmdist-prepare: this process, worker processes of this machine, or the workers of a Dask cluster.

    with Workers(2) as workers:
        workers.count(tasks, settings.text, learn, folder / "text.json", progress.show)     # counting.count(*task, ...)
        workers.run(corpus.encode, tasks)                                                   # [corpus.encode(*task), ...]

The functions are those of counting.py and corpus.py, whoever runs them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import DataError, Stopped, UsageError, one_line, require
from lmdist.settings import TextSettings
from lmdist.storage.atomic import atomic_path
from lmdist.text.counting import Report, Sources, count
from lmdist.text.tokenizer import WordTokenizer, import_early

Task = tuple[Any, ...]
"""The arguments of a call."""
CountTask = tuple[Path, Sources, int]
"""Those of `counting.count` that no engine knows: folder, sources and seed."""

SECONDS_BETWEEN_REPORTS = 0.5
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_CONNECT = 60


class Workers:
    """Worker processes of this machine, or this process alone; on any error they end with the context."""

    def __init__(self, number: int) -> None:
        self.pool: ProcessPoolExecutor | None = None
        if number > 1:
            # Not fork: the caller may be a training process with torch's threads in it.
            context = multiprocessing.get_context("spawn")
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

    def count(
        self,
        tasks: Sequence[CountTask],
        text: TextSettings,
        learn: Callable[[], WordTokenizer],
        text_json: Path,
        show: Report,
    ) -> None:
        """Count a shard for each of as many tasks as there are processes; tell `show` how far they are together.

        `learn` returns the tokenizer for `text`. It runs here, while the processes start and read up to the first row of their
        shards, and they find it in `text_json`.
        """
        if self.pool is None:
            tokenizer = learn()
            for task in tasks:
                count(*task, lambda: tokenizer, show)
            return
        with worker_errors():
            pending = {self.pool.submit(count_in_worker, index, text, text_json, task) for index, task in enumerate(tasks)}
            tokenizer = learn()
            with atomic_path(text_json) as path:
                tokenizer.save(path)
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_REPORTS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                values = list(self.progress)
                if any(values):
                    show(sum(values[0::3]), sum(values[1::3]), sum(values[2::3]))

    def run(self, function: Callable[..., Any], tasks: Sequence[Task]) -> list[Any]:
        """Return the results of a function for several tuples of arguments, in order."""
        if self.pool is None:
            return [function(*task) for task in tasks]
        with worker_errors():
            return [future.result() for future in [self.pool.submit(function, *task) for task in tasks]]


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise DataError for a worker process that was killed."""
    try:
        yield
    except BrokenProcessPool:
        raise DataError("a worker process was killed, most likely out of memory: lower --workers") from None


shared_progress: Any


def start_worker(lifeline: Connection, progress: Any) -> None:
    """Leave Ctrl-C to the parent, and end when it does or lets go of the lifeline: a pool's workers would wait forever."""
    global shared_progress
    shared_progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        try:
            lifeline.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def count_in_worker(index: int, text: TextSettings, text_json: Path, task: CountTask) -> None:
    """Count a shard, and tell the parent how far it is."""

    def learned() -> WordTokenizer:
        import_early(text)
        while not text_json.exists():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return WordTokenizer.load(text_json)

    def report(*done: int) -> None:
        shared_progress[3 * index : 3 * index + 3] = done

    count(*task, learned, report)


# --- a Dask cluster ------------------------------------------------------------------------------------------------


@contextmanager
def dask_cluster(address: str) -> Iterator[tuple[Any, int]]:
    """Yield the client of a Dask cluster, and how many threads its workers have; raise UsageError where there are none."""
    require("distributed", purpose="--scheduler needs Dask: ")
    from distributed import Client

    try:
        client: Any = Client(address, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:  # nobody answers; no address
        raise UsageError(f"--scheduler {address}: {one_line(error)}; `dask scheduler` prints its address") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
        except TimeoutError:
            raise UsageError(f"--scheduler {address} has no workers: `dask worker {address}` starts one") from None
        yield client, sum(client.nthreads().values())


def count_on_cluster(client: Any, function: Callable[..., Any], tasks: Sequence[Task]) -> None:
    """Call a function for each of several tuples of arguments on the workers of a cluster, again where a worker is lost.

    Raises Stopped where the cluster is lost: its errors are OSErrors, or mean that somebody has cancelled the calls.
    """
    from distributed import as_completed
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    try:
        futures = [client.submit(function, *task, pure=False) for task in tasks]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                log(f"{done} of {counted(len(futures), 'shard is', 'shards are')} counted")
        finally:
            client.cancel(futures)
    except KilledWorker as error:
        raise DataError(f"workers were killed, most likely out of memory: {one_line(error)}") from None
    except (CancelledError, CommClosedError, TimeoutError) as error:
        raise Stopped(f"the Dask cluster was lost ({one_line(error)}): run it again, the shards that are done stay") from None
