"""A Dask cluster whose workers count shards, for `lmdist-prepare --scheduler tcp://host:8786`.

    with dask_cluster("tcp://host:8786") as (client, num_threads):
        count_on_cluster(client, write_missing_shard, tasks)            # write_missing_shard(*task), ...

This module does not know what the calls do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from lmdist.console import log
from lmdist.counted import counted
from lmdist.errors import DataError, Stopped, UsageError, one_line, require

SECONDS_TO_CONNECT = 60


@contextmanager
def dask_cluster(address: str) -> Iterator[tuple[Any, int]]:
    """Yield the client of a Dask cluster, and how many threads its workers have.

    Raises UsageError where there are none, Stopped where the cluster is lost before one is there.
    """
    require("distributed", purpose="--scheduler needs Dask: ")
    from distributed import Client

    try:
        client: Any = Client(address, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:  # nobody answers; no address
        raise UsageError(f"--scheduler {address}: {one_line(error)}; `dask scheduler` prints its address") from None
    with client:
        try:
            if not client.nthreads():
                log(f"waiting for a worker of {address}")
            client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
            num_threads = sum(client.nthreads().values())
        except TimeoutError:
            raise UsageError(f"--scheduler {address} has no workers: `dask worker {address}` starts one") from None
        except OSError as error:
            raise lost(error) from None
        yield client, num_threads


def lost(error: Exception) -> Stopped:
    """Return the error for a cluster that went away."""
    return Stopped(f"the Dask cluster was lost ({one_line(error)}): run it again, the shards that are done stay")


def count_on_cluster(client: Any, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> None:
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
        raise lost(error) from None
