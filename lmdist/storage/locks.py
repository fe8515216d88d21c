"""A lock file that one process at a time may hold; the kernel releases it when its holder ends, however it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmdist.errors import Stopped


@contextmanager
def exclusive_lock(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock `path`; raises Stopped where another process still holds it after `patience` seconds.

    The kernel lets go of it when its holder ends, however it ends.
    """
    import fcntl  # not everywhere: a machine that only samples may be a Windows one

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Stopped(f"{path.parent} is in use by another job: let it end, or take another folder") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks keeps nobody out
                break
        yield
